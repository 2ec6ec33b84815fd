"""The ``report`` command."""

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``report RUN_DIR [--out FILE] [--json]``; the handler is set as ``run``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report",
        help="write one self-contained HTML page about a run",
        description="Write one self-contained HTML page about a run: the family, curves, router choices, "
        "importance, sample texts, and how it was made. It needs no network to look at.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run folder (run_dir of the recipe)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="page to write (default: RUN_DIR/report.html)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else")
    parser.set_defaults(handler=run)
    return parser


def run(args: argparse.Namespace) -> dict[str, str] | None:
    """Write the page; with ``--json`` return ``{"report": path}``, otherwise show family and router."""
    # imported here so that `--help` of every command stays fast
    from rich.console import Console

    from elastic_megatron.report.console import family_table, quantized_table, router_table
    from elastic_megatron.report.page import write_report
    from elastic_megatron.report.read import read_run

    path = write_report(args.run_dir, out=args.out)
    if args.json:
        return {"report": str(path)}
    console, data = Console(), read_run(args.run_dir)
    if data.submodels:
        console.print(family_table(data.report))
    if table := quantized_table(args.run_dir):
        console.print(table)
    if data.routers:
        console.print(router_table(data.routers[-1]))
    console.print(f"wrote {path}", markup=False, soft_wrap=True)
    return None
