"""The console script ``elastic-megatron``: parsing, exit codes and JSON output; each command has its own module."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .commands import convert, evaluate, plan, quickstart, rank, recipe, train
from .data import cli as prepare_data
from .errors import UserError
from .report import cli as report

COMMANDS = (quickstart, plan, recipe, prepare_data, rank, train, convert, evaluate, report)


class _Parser(argparse.ArgumentParser):
    """Bad arguments are one line and exit 2, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line. Imports nothing heavy: ``--help`` and ``recipe`` work on a login node."""
    parser = _Parser(
        prog="elastic-megatron", description="Many nested model sizes from one Megatron checkpoint."
    )
    parser.add_argument("--version", action="version", version=f"elastic-megatron {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command: 0 on success, 2 on bad input with one ``error:`` line, 1 on an internal failure.

    With ``--json`` stdout carries the command's one JSON object and everything else goes to stderr.
    """
    args = build_parser().parse_args(argv)
    _quiet()
    machine_readable = getattr(args, "json", False)
    try:
        with contextlib.redirect_stdout(sys.stderr) if machine_readable else contextlib.nullcontext():
            result = args.handler(args)
        if machine_readable:
            print(json.dumps(result), flush=True)
    except UserError as e:
        for line in str(e).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough; keep the interpreter from flushing into the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:  # an internal failure: the traceback is for a bug report
        traceback.print_exc()
        print("this is a defect of elastic-megatron; please report it with the traceback", file=sys.stderr)
        return 1
    return 0


def _quiet() -> None:
    """Silence third-party chatter that a user cannot act on; ELASTIC_MEGATRON_DEBUG=1 shows it."""
    if os.environ.get("ELASTIC_MEGATRON_DEBUG"):
        return
    import logging

    warnings.simplefilter("ignore")
    for name in ("megatron", "torch", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
