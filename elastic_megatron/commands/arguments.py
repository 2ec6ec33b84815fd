"""What commands refuse of their arguments before torch is imported: names, paths and numbers that cannot be right."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.manifest import Manifest
from ..checkpoint.named import check_cut, described, foreign_folder, is_hf
from ..checkpoint.resolve import CONFIG
from ..checkpoint.tracker import is_checkpoint, resolve
from ..data.documents import Tally, read_documents
from ..data.inputs import Reading, look_into
from ..data.outputs import check_tokenizer
from ..errors import UserError
from ..files.targets import check_apart, check_vacant, check_writable


def text_of(path: Path, *, as_text: bool = False) -> str:
    """A UTF-8 text, compressed or not, from a file or a pipe.

    Raises ``UserError`` where it cannot be read, is empty, or is JSON, unless ``as_text``.
    """
    reading = Reading(as_text=as_text)
    [found] = look_into([path], reading)
    if found.form != "text":
        raise UserError(f"{path} holds JSON lines, not text; write their texts into a file and give that")
    text = "".join(document.text for document in read_documents([found], reading, None, Tally()))
    if not text:
        raise UserError(f"{path} is empty; give a text")
    return text


def at_least(option: str, value: float, least: int, why: str = "") -> None:
    """Raise ``UserError`` for a number below ``least``."""
    if not value >= least:
        raise UserError(f"{option} {value}{why}; give {least} or more")


def check_served(source: Path, names: Sequence[str]) -> None:
    """Raise ``UserError`` unless ``source`` is a model with these submodels and a tokenizer.

    Of a checkpoint of another program, whose names are not known, that is seen when it is opened.
    """
    manifest = described(source)
    if manifest is None:
        return
    for name in names:
        manifest.submodel(name)
    if is_checkpoint(source):
        if not (resolve(source) / "hf").is_dir():
            raise UserError(f"{source} carries no tokenizer; export it with a model that has one")
    else:
        check_tokenizer(source)


def check_import(args: argparse.Namespace) -> None:
    """Raise ``UserError`` unless there is a model to import and room for a checkpoint beside it."""
    described(args.source)
    if is_checkpoint(args.destination):
        raise UserError(f"{args.destination} holds a checkpoint already; choose another folder")
    check_apart(args.destination, args.source)
    check_writable(args.destination)


def check_export(args: argparse.Namespace) -> None:
    """Raise ``UserError`` unless there is a checkpoint with what is asked for, and its place is free."""
    if args.config is not None and not is_hf(args.config):
        raise UserError(f"{args.config} has no {CONFIG}; give a Hugging Face model directory")
    if len(args.destination) > 1:
        raise UserError(f"{args.destination[1]!r} is too much: export CKPT HF_DIR writes one directory")
    names = [] if args.submodel is None else [args.submodel]
    _check_cuts(args, described(args.source), names, [Path(args.destination[0])])


def check_slice(args: argparse.Namespace) -> None:
    """Raise ``UserError`` unless there is a family with these submodels, and their places are free."""
    names = list(dict.fromkeys(args.submodel))
    targets = [args.destination / name for name in names] if len(names) > 1 else [args.destination]
    _check_cuts(args, described(args.source), names, targets)


def _check_cuts(
    args: argparse.Namespace, manifest: Manifest | None, names: Sequence[str], targets: Sequence[Path]
) -> None:
    if args.elastic and args.plain_order:
        raise UserError("--elastic keeps the stored order, which --plain-order undoes; choose one of them")
    for name in names or [None]:
        if manifest is not None:
            check_cut(args.source, manifest, name, args.elastic)
    for target in targets:
        check_apart(target, _folder_of(args.source))
        check_vacant(target)


def _folder_of(source: Path) -> Path:
    """The folder whose files are read: of a run folder, the checkpoint in it."""
    return foreign_folder(source) or (resolve(source) if is_checkpoint(source) else source)
