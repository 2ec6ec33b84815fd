"""``elastic-megatron import``, ``export`` and ``slice``: between Megatron checkpoints and Hugging Face directories."""

from __future__ import annotations

import argparse
import re
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..conversion import Report

_DTYPES = ("fp32", "bf16")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("import", help="Hugging Face directory -> Megatron checkpoint")
    parser.add_argument("source", type=Path, metavar="HF_DIR")
    parser.add_argument("destination", type=Path, metavar="CKPT", help="must hold no checkpoint yet")
    _common(parser)
    parser.set_defaults(handler=_import)

    parser = subparsers.add_parser(
        "export",
        help="Megatron checkpoint -> Hugging Face directory",
        usage="%(prog)s CKPT HF_DIR [options]\n       %(prog)s RECIPE [key=value ...] [--json]",
    )
    source = parser.add_argument(
        "source", action=_Source, type=Path, metavar="CKPT | RECIPE",
        help="run folder, checkpoint or iter_* folder; or a recipe (.yaml), whose section export says the rest",
    )  # fmt: skip
    source.destination = parser.add_argument(
        "destination", nargs="+", metavar="HF_DIR | key=value",
        help="directory to write, which must not exist yet, or be empty; or values that win over the recipe's",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--submodel", metavar="NAME", help="export one submodel")
    what.add_argument(
        "--elastic", action="store_true", help="the full model with elastic_config.json, to slice later"
    )
    parser.add_argument(
        "--config", type=Path, metavar="HF_DIR",
        help="for a checkpoint of Megatron-LM or Megatron-Bridge: the directory the model came from",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=_DTYPES, help="data type of the weights (default: as stored)")
    _common(parser)
    _to_hf(parser)
    parser.set_defaults(handler=_export)

    parser = subparsers.add_parser("slice", help="cut submodels out of an elastic directory or checkpoint")
    parser.add_argument(
        "source", type=Path, metavar="SRC", help="elastic Hugging Face directory or checkpoint"
    )
    parser.add_argument(
        "destination", type=Path, metavar="DST", help="a directory; of several submodels it holds one each"
    )
    parser.add_argument(
        "--submodel", required=True, action="append", metavar="NAME", help="may be given several times"
    )
    parser.add_argument(
        "--elastic", action="store_true", help="keep the smaller submodels nested in it, to slice again"
    )
    _common(parser)
    _to_hf(parser)
    parser.set_defaults(handler=_slice)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify", action="store_true", help="read everything back and compare it with the source"
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="write numbers that are not finite, with a warning"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def _to_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plain-order", action="store_true", help="undo the lanes: plain prefixes, best first"
    )
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE",
        help="of a safetensors file: 500MB, 5GB, 2GiB (default: 5GB)",
    )  # fmt: skip
    parser.add_argument(
        "--trust-source", action="store_true",
        help="do not compare a checkpoint's files with their digests first",
    )  # fmt: skip


def _import(args: argparse.Namespace) -> dict[str, Any] | None:
    from .arguments import check_import

    check_import(args)
    from ..checkpoint.source import open_stored
    from ..conversion import to_megatron

    source = open_stored(args.source)
    report = to_megatron(
        source,
        args.destination,
        verify=args.verify,
        allow_nonfinite=args.allow_nonfinite,
        progress=_Progress("import"),
    )
    return _done(args, report)


class _Source(argparse.Action):
    """A recipe says where to write to, and a checkpoint does not."""

    destination: argparse.Action

    def __call__(self, parser: object, namespace: argparse.Namespace, values: Any, *_: object) -> None:
        namespace.source = values
        if _is_recipe(values):
            self.destination.required = False


def _is_recipe(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml") and not path.is_dir()


def _export(args: argparse.Namespace) -> dict[str, Any] | None:
    if _is_recipe(args.source):
        return _export_recipe(args)
    from .arguments import check_export

    check_export(args)
    from ..conversion import Request

    request = Request(Path(args.destination[0]), args.submodel, args.elastic, args.plain_order)
    return _write(args, [request], config=args.config, dtype=args.dtype)


def _export_recipe(args: argparse.Namespace) -> dict[str, Any] | None:
    """Write the directories that are missing; one JSON object or text says which were there."""
    from ..recipe import load
    from .export_recipe import export

    given = ("submodel", "elastic", "config", "dtype", "verify", "plain_order", "allow_nonfinite")
    if flags := [name for name in given if getattr(args, name)]:
        raise UserError(
            f"--{flags[0].replace('_', '-')} is for checkpoints; in a recipe write it into export"
        )
    recipe = load(args.source, args.destination or ())
    done = export(
        recipe, max_shard_bytes=args.max_shard_size, trust=args.trust_source, progress=_Progress("export")
    )
    if not args.json:
        for path in done.kept:
            print(f"{path} is there already")
    said = _done(args, done.report) if args.json or done.report.written else None
    return None if said is None else said | {"kept": [str(path) for path in done.kept]}


def _slice(args: argparse.Namespace) -> dict[str, Any] | None:
    from .arguments import check_slice

    check_slice(args)
    from ..conversion import Request

    names = list(dict.fromkeys(args.submodel))
    several = len(names) > 1
    requests = [
        Request(args.destination / n if several else args.destination, n, args.elastic, args.plain_order)
        for n in names
    ]
    return _write(args, requests)


def _write(
    args: argparse.Namespace, requests: Sequence[Any], config: Path | None = None, dtype: str | None = None
) -> dict[str, Any] | None:
    import torch

    from ..checkpoint.source import open_stored
    from ..conversion import to_hf

    source = open_stored(args.source, config)
    report = to_hf(
        source,
        requests,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[dtype],
        max_shard_bytes=args.max_shard_size,
        verify=args.verify,
        trust=args.trust_source,
        allow_nonfinite=args.allow_nonfinite,
        progress=_Progress("convert"),
    )
    return _done(args, report)


def _done(args: argparse.Namespace, report: Report) -> dict[str, Any] | None:
    for line in report.notes:
        print(line, file=sys.stderr)
    if args.json:
        return report.to_dict()
    for path in report.written:
        print(f"wrote {path}")
    note = ", read back and equal to its source" if report.verified else ""
    print(f"{report.tensors} tensors, {report.bytes_written / 1e9:.2f} GB{note}")
    return None


def _size(text: str) -> int:
    """Bytes of ``5GB``, ``500 MiB`` or a plain number."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match and match[2].upper() in _UNITS else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB, 500MB or 2GiB")
    return size


class _Progress:
    """Says on stderr how much has been read, every few seconds."""

    def __init__(self, what: str, every: float = 5.0) -> None:
        self._what, self._every = what, every
        self._lock, self._bytes = threading.Lock(), 0
        self._start = self._said = time.monotonic()

    def __call__(self, read: int) -> None:
        with self._lock:
            self._bytes += read
            now = time.monotonic()
            if now - self._said >= self._every:
                self._said = now
                rate = self._bytes / 1e6 / (now - self._start)
                print(f"{self._what}: {self._bytes / 1e9:.1f} GB read, {rate:.0f} MB/s", file=sys.stderr)
