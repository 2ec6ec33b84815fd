"""Write the table of docs/parallelism.md from the results of the parallel tests.

pytest tests/parallel --parallel-results docs/parallel_results.json
python tools/parallel_table.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from elastic_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "tests" / "parallel")]

from layouts import AXES, LAYOUTS, PROPERTIES, Axis, Layout  # noqa: E402
from readme_block import read_json, replace_block, table  # noqa: E402

PAGE = ROOT / "docs" / "parallelism.md"
RESULTS = ROOT / "docs" / "parallel_results.json"
COMMAND = "pytest tests/parallel --parallel-results docs/parallel_results.json"
BLOCK = "parallelism-table"
HEADINGS = ("axis", "rule", "tested layouts")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="file that the tests wrote")
    parser.add_argument(
        "--page", type=Path, default=PAGE, help="file to change (default: docs/parallelism.md)"
    )
    args = parser.parse_args()
    try:
        block = render(read_json(args.results, COMMAND))
        text = replace_block(args.page.read_text(encoding="utf-8"), BLOCK, block)
        args.page.write_text(text, encoding="utf-8")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def render(results: Mapping[str, Mapping[str, bool]]) -> str:
    """On how many layouts which property was proven, and a row for each axis with the layouts that test it.

    Raises ``UserError`` where a layout has no results, or a test of it failed.
    """
    for layout in LAYOUTS:
        found = _found(results, layout)
        failed = ", ".join(name for name, passed in found.items() if not passed)
        if failed or not found:
            what = f"failed in {failed}" if failed else "has no results"
            raise UserError(f"layout {layout.name} {what}; run {COMMAND}")
    counts = {name: sum(name in _found(results, layout) for layout in LAYOUTS) for name in PROPERTIES}
    lead = ", ".join(f"{name} ({count} layouts)" for name, count in counts.items())
    lines = table(HEADINGS, [":---"] * len(HEADINGS), map(_row, AXES))
    return "\n".join([f"Compared with one process: {lead}.", "", *lines])


def _found(results: Mapping[str, Mapping[str, bool]], layout: Layout) -> Mapping[str, bool]:
    try:
        return dict(results.get(layout.name, {}))
    except (AttributeError, TypeError, ValueError) as e:
        raise UserError(f"these are no results of the parallel tests ({e}); run {COMMAND}") from None


def _row(axis: Axis) -> tuple[str, str, str]:
    name = axis.name if axis.key is None else f"{axis.name}: `{axis.key}`"
    return name, axis.rule, ", ".join(layout.name for layout in axis.layouts)


if __name__ == "__main__":
    sys.exit(main())
