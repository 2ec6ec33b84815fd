"""``elastic-megatron prepare-data``. Nothing heavy is imported before the command runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_megatron.data.prepare import PrepareReport

_DESCRIPTION = """Tokenise text into Megatron .bin/.idx files.

INPUT is a text file (one document), or a .jsonl file (one JSON object per line: a document under
--json-key, or with --chat a conversation under "messages")."""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``prepare-data`` on ``subparsers`` (of ``argparse``); ``args.handler`` is set to ``run``."""
    parser = subparsers.add_parser(
        "prepare-data",
        help="tokenise text, JSON lines or chats into Megatron .bin/.idx files",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="text or .jsonl files")
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
        "--json-key", default="text", metavar="KEY", help="key of the text in .jsonl files (default: text)"
    )
    parser.add_argument("--chat", action="store_true", help="read messages, use the chat template")
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
    """Run the command: ``{"tokenizer": DIR, "datasets": [PrepareReport as a dict, ...]}``.

    Prints a summary unless ``args.json``; the caller prints the JSON.
    """
    from elastic_megatron.data.prepare import prepare, prepare_split
    from elastic_megatron.data.tokenizer import byte_tokenizer

    tokenizer_dir = Path(args.tokenizer)
    if args.tokenizer == "bytes":
        tokenizer_dir = Path(f"{args.output}_tokenizer")
        byte_tokenizer().save_pretrained(tokenizer_dir)
    options: dict[str, Any] = {
        "json_key": args.json_key,
        "append_eos": not args.no_eos,
        "chat": args.chat,
    }
    with _progress(args.inputs) as progress:
        options["progress"] = progress
        if args.valid_fraction is None:
            reports = (prepare(args.inputs, args.output, tokenizer_dir, **options),)
        else:
            options["valid_fraction"] = args.valid_fraction
            reports = prepare_split(args.inputs, args.output, tokenizer_dir, **options)
    if not args.json:
        _print_summary(reports, tokenizer_dir)
    return {"tokenizer": str(tokenizer_dir), "datasets": [asdict(report) for report in reports]}


@contextmanager
def _progress(inputs: list[Path]) -> Iterator[Callable[[int], None]]:
    """A progress bar in bytes of input on standard error, drawn only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("tokenising"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=sum(path.stat().st_size for path in inputs if path.is_file()))
        yield lambda done: bar.advance(task, done)


def _print_summary(reports: tuple[PrepareReport, ...], tokenizer_dir: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(caption=f"tokenizer: {tokenizer_dir}")
    table.add_column("data set", overflow="fold")
    for name in ("documents", "tokens", "dtype"):
        table.add_column(name, justify="right")
    for report in reports:
        table.add_row(report.prefix, f"{report.documents:,}", f"{report.tokens:,}", report.dtype)
    Console().print(table)
