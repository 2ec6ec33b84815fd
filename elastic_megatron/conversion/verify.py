"""Compare what was written with what it was made from, both read by the libraries of their formats.

Nothing that read the source or wrote the target is used: no reader of rows, no tile, no sink. What both sides share is
the layout table, that is where rows and columns of a tensor belong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.stored import Entry, Files, Piece, StoredModel
from ..errors import UserError
from .copy import Progress, in_threads
from .cut import Cut, Model

_BLOCK = 4 << 20
_REMEDY = "memory or disk is faulty, or this program is: convert again, and report it if it happens again"


def compare(
    source: StoredModel, model: Model, written: StoredModel, progress: Progress | None = None
) -> None:
    """Raise ``UserError`` that names the first tensor of ``written`` that is not that of ``model`` to the bit.

    Args:
        written: the target, its files read by a library.
        progress: called with the number of bytes read of the target, from several threads.
    """
    again = replace(source, files=source.files.reread())

    def work(cut: Cut) -> None:
        _compare(again, cut, written)
        if progress is not None:
            progress(prod(cut.target.shape) * cut.dtype.itemsize)

    in_threads(work, model.cuts)


def check_entries(where: Path, found: Mapping[str, Entry], wanted: Mapping[str, Entry]) -> None:
    """Raise ``UserError`` unless a library finds exactly these tensors in files."""
    for key in sorted(wanted.keys() | found.keys()):
        if found.get(key) != wanted.get(key):
            raise UserError(
                f"{where}: tensor {key!r} {_told(found.get(key))} when read back, and should be "
                f"{_told(wanted.get(key))}; {_REMEDY}"
            )


def refuted(where: Path, what: str) -> UserError:
    """The error where something beside the tensors is not what it should be."""
    return UserError(f"{where} {what} when read back; {_REMEDY}")


def _told(entry: Entry | None) -> str:
    return (
        "is absent" if entry is None else f"{list(entry.shape)} of {str(entry.dtype).removeprefix('torch.')}"
    )


def _compare(source: StoredModel, cut: Cut, written: StoredModel) -> None:
    shape, pieces = cut.target.shape, source.pieces(cut.source)
    step = max(1, _BLOCK // max(1, prod(shape[1:]) * cut.dtype.itemsize))
    for first in range(0, shape[0], step):
        own = torch.arange(first, min(first + step, shape[0]))
        wanted = _taken(
            source.files, pieces, own if cut.rows is None else cut.rows[own], cut.source.shape[1:]
        )
        if cut.columns is not None:
            wanted = wanted.index_select(1, cut.columns)
        found = _taken(written.files, written.pieces(cut.target), own, shape[1:])
        wanted = wanted.to(cut.dtype)
        if found.dtype != wanted.dtype or not torch.equal(_bits(found), _bits(wanted)):
            raise UserError(
                f"{written.path}: tensor {cut.target.name!r} differs from its source in rows {first} to "
                f"{first + len(own) - 1} when read back; {_REMEDY}"
            )


def _taken(files: Files, pieces: Sequence[Piece], positions: Tensor, inner: tuple[int, ...]) -> Tensor:
    """Rows of a tensor by their positions, of which all between the first and the last are read."""
    low, high = int(positions.min()), int(positions.max()) + 1
    dtypes = [files.entries[piece.key].dtype for piece in pieces]
    out = torch.empty((high - low, *inner), dtype=reduce(torch.promote_types, dtypes))
    top = 0
    for piece, dtype in zip(pieces, dtypes, strict=True):
        first, last = max(low, top), min(high, top + piece.rows)
        if first < last:
            part = torch.empty((last - first, *inner), dtype=dtype)
            files.read(piece.key, piece.start + first - top, part)
            out[first - low : last - low] = part
        top += piece.rows
    return out if len(positions) == high - low and _in_order(positions) else out[positions - low]


def _in_order(positions: Tensor) -> bool:
    return bool((positions.diff() == 1).all())


def _bits(tensor: Tensor) -> Tensor:
    """Bytes: a NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
