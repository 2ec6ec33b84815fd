"""``elastic-megatron quickstart``: the whole story on this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from ..errors import UserError


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="the whole story on this machine: parent, rank, train, slice, export, evaluate, report",
        description="Trains a small hybrid model on real text, makes it elastic and shows what each size costs "
        "and loses. Minutes on 2 CPU cores. Interrupt it at any time: run again, it goes on where it was.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("quickstart"), help="folder to write (default: quickstart)"
    )
    parser.add_argument("--recipes", type=Path, help="folder with parent.yaml, rank.yaml, elastic.yaml "
                        "(default: those of the tiny model, which come along)")  # fmt: skip
    parser.add_argument(
        "--text", type=Path, help="training text (default: that of examples/data, which comes along)"
    )
    parser.add_argument("--heldout", type=Path, help="held-out text, required with --text")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object on stdout")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    # threads that wait must sleep: spinning ones stall each other as soon as the machine has other work
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from ..quickstart import quickstart

    if (args.text is None) != (args.heldout is None):
        raise UserError("--text and --heldout come together: one to train on, one to be judged on")
    # SIGTERM is an exception, so that the training ranks are stopped too: they save and leave nothing running
    report = quickstart(args.out, recipes=args.recipes, text=args.text, heldout=args.heldout)
    return report if args.json else None
