"""Write the pages of the public names from their docstrings, by pdoc: ``python tools/api_page.py [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path

import pdoc

import elastic_megatron

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    for name in elastic_megatron.__all__:
        getattr(
            elastic_megatron, name
        )  # pdoc sees what is in the module, and these names come when they are used
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "api"
    pdoc.render.configure(docformat="google", footer_text=f"elastic_megatron {elastic_megatron.__version__}")
    # the package's own page alone: what its folders hold besides may change in any version
    pdoc.pdoc("elastic_megatron", "!elastic_megatron.", output_directory=folder)
    print(folder / "elastic_megatron.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
