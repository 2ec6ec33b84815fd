"""Write the table of docs/engines.md from what the engines' tests found.

python tools/engines_table.py [docs/engine_results.json]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from readme_block import read_json, replace_block, table  # noqa: E402

from elastic_megatron.errors import UserError  # noqa: E402

PAGE = ROOT / "docs" / "engines.md"
RESULTS = ROOT / "docs" / "engine_results.json"
BLOCK = "engines-table"
COMMAND = "make engines"
HEADINGS = ("engine", "family", "directory", "largest difference")


def main() -> int:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    try:
        text = replace_block(PAGE.read_text(encoding="utf-8"), BLOCK, render(read_json(source, COMMAND)))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    PAGE.write_text(text, encoding="utf-8")
    return 0


def render(results: Sequence[Mapping[str, Any]]) -> str:
    """A row for each directory that an engine computed, or refused in its own words."""
    rows = [(r["engine"], r["family"], r["kind"], _said(r["difference"])) for r in results]
    return "\n".join(table(HEADINGS, (":---", ":---", ":---", "---:"), rows))


def _said(found: float | str) -> str:
    return found if isinstance(found, str) else f"{found:.0e}"


if __name__ == "__main__":
    sys.exit(main())
