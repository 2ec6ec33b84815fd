"""``elastic-megatron prepare-data``. Nothing heavy is imported before the command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic_megatron.data.inputs import Input, Reading, look_into
from elastic_megatron.data.outputs import BYTES, check_outputs, check_share, check_tokenizer, tokenizer_of

if TYPE_CHECKING:
    from elastic_megatron.data.prepare import Prepared

_DESCRIPTION = """Tokenise text into Megatron .bin/.idx files.

INPUT is a text (one document), or JSON lines (one JSON object per line: a document under --json-key, or with
--chat a conversation under "messages"). JSON lines are: all inputs with --json-key or --chat; names with .jsonl,
.ndjson or .json (also .jsonl.gz, .jsonl.part-00); and any input of whose first lines most begin like {"..." or [.
All inputs are text with --as-text. A file that is one JSON value over several lines is refused.

Compressed inputs (gzip, bzip2, xz; zstd with the package zstandard) are known by their content and unpacked as they
are read. A pipe may be an input: <(zcat FILE). A byte order mark is dropped, blank lines and empty texts are left out
and counted. Any other line that cannot be used ends the command, which then leaves nothing: not UTF-8, not JSON (or
nested too deeply), no object, a key given twice, no such key, a value that is no string (null too), half of a
surrogate pair, longer than 128 MiB. With --skip-bad-lines such lines are left out, and counted by reason. Numbers are
never read as text; of any length, NaN too, they do no harm."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``prepare-data`` on ``subparsers`` (of ``argparse``); ``args.handler`` is set to ``run``."""
    parser = subparsers.add_parser(
        "prepare-data",
        help="tokenise text, JSON lines or chats into Megatron .bin/.idx files",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "inputs", nargs="+", type=Path, metavar="INPUT", help="text or JSON lines, compressed or not"
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="PREFIX", help="write PREFIX.bin and PREFIX.idx"
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help="Hugging Face directory of the model, or 'bytes' for the built-in byte tokenizer, "
        "which is saved as PREFIX_tokenizer/",
    )
    parser.add_argument(
        "--json-key", metavar="KEY", help="inputs are JSON lines, with the text under KEY (default: text)"
    )
    parser.add_argument(
        "--chat", action="store_true", help="inputs are JSON lines of messages; use the chat template"
    )
    parser.add_argument("--as-text", action="store_true", help="inputs are text, whatever they look like")
    parser.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="leave out JSON lines that cannot be used, and say how many",
    )
    parser.add_argument("--no-eos", action="store_true", help="do not end documents with the eos token")
    parser.add_argument(
        "--valid-fraction",
        type=float,
        metavar="F",
        help="hold out this share of the documents (of a single document: its tail) "
        "and write PREFIX_train and PREFIX_valid instead",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(handler=run)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command: ``{"tokenizer": DIR, "datasets": [PrepareReport, ...], "inputs": [...], "skipped": {...}}``.

    Of inputs, how each was read; of what was left out, how much and where first, by reason. Prints a summary unless
    ``args.json``; the caller prints the JSON.
    """
    reading = Reading(args.json_key, args.chat, args.as_text, args.skip_bad_lines)
    check_share(args.valid_fraction)
    check_tokenizer(args.tokenizer)
    inputs = look_into(args.inputs, reading)
    check_outputs(args.output, args.valid_fraction, args.tokenizer, inputs)
    from elastic_megatron.data import prepare

    with _progress(inputs) as progress:
        job = prepare.Job(
            args.output, args.tokenizer, reading, not args.no_eos, args.valid_fraction, progress
        )
        done = prepare.run(inputs, job)
    tokenizer_dir = str(tokenizer_of(args.output)) if args.tokenizer == BYTES else args.tokenizer
    if not args.json:
        _print_summary(done, tokenizer_dir)
    return {
        "tokenizer": tokenizer_dir,
        "datasets": [asdict(report) for report in done.datasets],
        "inputs": [{"path": str(each.path), "form": each.form, "packing": each.packing} for each in inputs],
        "skipped": {reason: asdict(left) for reason, left in done.tally.left.items()},
    }


@contextmanager
def _progress(inputs: Sequence[Input]) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes of input on standard error, drawn only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("tokenising"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(each.size or 0 for each in inputs))
        yield lambda done: bar.advance(task, done)


def _print_summary(done: Prepared, tokenizer_dir: str) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(caption=escape(f"tokenizer: {tokenizer_dir}"))
    table.add_column("data set", overflow="fold")
    for name in ("documents", "tokens", "dtype"):
        table.add_column(name, justify="right")
    for report in done.datasets:
        table.add_row(escape(report.prefix), f"{report.documents:,}", f"{report.tokens:,}", report.dtype)
    console = Console()
    console.print(table)
    for reason, left in done.tally.left.items():
        text = f"left out: {left.count:,} x {reason}, first {left.first}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
