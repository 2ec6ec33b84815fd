"""Write the family table of README.md from a run of the quickstart.

python tools/readme_table.py quickstart/report.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_megatron.errors import UserError
from elastic_megatron.report import format as say

sys.path.insert(0, str(Path(__file__).resolve().parent))

from readme_block import README, markers, read_json, replace_block, table

BLOCK = "family-table"
BEGIN, END = markers(BLOCK)
HEADINGS = (
    "size",
    "parameters",
    "active",
    "asked",
    "chosen",
    "unsorted slice",
    "sorted slice",
    "trained",
    "gap closed",
    "logit difference",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="report.json of the quickstart")
    parser.add_argument("--readme", type=Path, default=README, help="file to change (default: README.md)")
    args = parser.parse_args()
    try:
        block = render(read_json(args.report, "make quickstart"))
        text = replace_block(args.readme.read_text(encoding="utf-8"), BLOCK, block)
        args.readme.write_text(text, encoding="utf-8")
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


def render(report: Mapping[str, Any]) -> str:
    """The Markdown table and the sentence above it; the parent first, then the submodels in order.

    Raises ``UserError`` where ``report`` is not a complete report of the quickstart.
    """
    try:
        parent, data = report["parent"], report["data"]
        rows = [_parent_row(parent)]
        rows += [_row(name, m) for name, m in report["submodels"].items()]
        lead = (
            f"Losses in {data['unit']} on {data['eval_tokens']:,} held-out bytes; seed {report['seed']}, "
            f"data-parallel ranks {min(2, report['machine']['cores'])}."
        )
    except (KeyError, TypeError) as e:
        raise UserError(
            f"this is no report.json of the quickstart ({type(e).__name__}: {e}); run make quickstart"
        ) from None
    rule = [":---"] + ["---:"] * (len(HEADINGS) - 1)
    return "\n".join([lead, "", *table(HEADINGS, rule, rows)])


def _parent_row(parent: Mapping[str, Any]) -> tuple[str, ...]:
    sizes = (say.count(parent["total_params"]), say.count(parent["active_params"]))
    return ("parent", *sizes, "", "", "", "", say.loss(parent["loss"]), "", "")


def _row(name: str, m: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name,
        say.count(m["total_params"]),
        say.count(m["active_params"]),
        say.percent(m["target_cost"], 1),
        say.percent(m["realised_cost"], 1),
        say.loss(m["loss_unsorted_slice"]),
        say.loss(m["loss_sorted_slice"]),
        say.loss(m["loss_trained"]),
        "" if m["gap_closed"] is None else say.percent(m["gap_closed"]),
        f"{m['logits_error']:.0e}",
    )


if __name__ == "__main__":
    sys.exit(main())
