"""``elastic-megatron init DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..files.shipped import MODELS, write_project

_NEXT = {
    "tiny": """\
for part in train valid; do
  elastic-megatron prepare-data examples/data/shakespeare_$part.txt --output runs/tiny_cpu/data/$part --tokenizer bytes
done
elastic-megatron plan recipes/tiny_cpu/chain.yaml
elastic-megatron submit recipes/tiny_cpu/chain.yaml cluster=recipes/clusters/local.yaml --dry-run""",
    "nano30b": "elastic-megatron plan recipes/nemotron3_nano_30b/plan.yaml",
    "nano12b": "elastic-megatron plan recipes/nemotron_nano_v2_12b/plan.yaml",
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "init",
        help="write recipes, cluster files and their schemas into a folder, to edit and to submit",
        description="Writes the recipes of a model, cluster files, the JSON schemas for editors and, for the "
        "tiny model, its texts. Nothing that is there is changed. Example: elastic-megatron init family --model tiny",
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder to write to; made where it is missing"
    )
    parser.add_argument(
        "--model", choices=MODELS, default="tiny", help="tiny trains on a CPU in minutes (default: tiny)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    written = write_project(args.folder, args.model)
    if args.json:
        return {
            "folder": str(args.folder),
            "written": [str(path.relative_to(args.folder)) for path in written],
        }
    print(f"{args.folder}: {len(written)} files. Next:\n\ncd {args.folder}\n{_NEXT[args.model]}")
    return None
