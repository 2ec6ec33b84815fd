"""Copy tensors from a source to any number of targets, by tiles, in bounded memory and in several threads.

A tile is a stretch of rows of one source tensor. It is read once, cut for each target that needs rows of it, and
handed to that target's sink, which writes them where they belong; so no order among tiles is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from ..checkpoint.stored import ModelTensor, StoredModel
from .cut import Cut, Model, by_source

TILE = 4 << 20
# rows that no target wants are read where that joins two reads across less than this
_GAP = 256 << 10
# beyond this many stretches, columns are gathered one by one
_STRETCHES = 256
Progress = Callable[[int], object]


class Sink(Protocol):
    """Takes rows of a target's tensors, from several threads, in any order."""

    def write(self, tensor: ModelTensor, start: int, rows: Tensor) -> None:
        """``rows`` are those from ``start``, contiguous, of the dtype of the tensor's cut."""
        ...


@dataclass(frozen=True)
class Tile:
    """Rows ``start`` to ``stop`` of a source tensor, and (target, cut) of each use."""

    tensor: ModelTensor
    start: int
    stop: int
    uses: Sequence[tuple[int, Cut]]


def copy(
    source: StoredModel, models: Sequence[Model], sinks: Sequence[Sink], progress: Progress | None = None
) -> int:
    """Give every row of every model to its sink; returns the bytes read from the source.

    Args:
        progress: called with the number of bytes read, from several threads.
    """

    def work(tile: Tile) -> int:
        rows = source.rows(tile.tensor, tile.start, tile.stop)
        for model, cut in tile.uses:
            for start, part in cut_rows(cut, rows, tile.start):
                sinks[model].write(cut.target, start, part)
        if progress is not None:
            progress(rows.nbytes)
        return rows.nbytes

    jobs = [tile for tensor, uses in by_source(models) for tile in tiles(source, tensor, uses)]
    return sum(in_threads(work, jobs))


def threads() -> int:
    """Threads of a conversion: twice the cores, as some wait for the disk; memory grows with them."""
    return min(8, 2 * len(os.sched_getaffinity(0)))


def in_threads[Job, Result](work: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
    """``work`` of every job, in several threads; the first failure stops all and is raised."""
    with single_threaded_torch(), ThreadPoolExecutor(threads()) as pool:
        try:
            return list(pool.map(work, jobs))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """The threads are ours: each that called into OpenMP would get a team of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tiles(source: StoredModel, tensor: ModelTensor, uses: Sequence[tuple[int, Cut]]) -> Iterator[Tile]:
    """The rows that are needed of a tensor, in stretches of at most ``TILE`` bytes."""
    row_bytes = max(1, prod(tensor.shape[1:]) * source.dtype(tensor).itemsize)
    step = max(1, TILE // row_bytes)
    for first, last in _needed(tensor.shape[0], uses, _GAP // row_bytes):
        for start in range(first, last, step):
            yield Tile(tensor, start, min(last, start + step), uses)


def _needed(size: int, uses: Sequence[tuple[int, Cut]], gap: int) -> list[tuple[int, int]]:
    """Stretches of rows that some use needs, with gaps up to ``gap`` rows closed."""
    if any(cut.rows is None for _, cut in uses):
        return [(0, size)]
    wanted = torch.cat([cut.rows for _, cut in uses if cut.rows is not None]).unique(sorted=True)
    breaks = (wanted.diff() > gap + 1).nonzero().flatten() + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in wanted.tensor_split(breaks)]


def cut_rows(cut: Cut, rows: Tensor, first: int) -> Iterator[tuple[int, Tensor]]:
    """The stretches of a target's rows that lie in source rows from ``first`` on: (where in the target, rows)."""
    if cut.rows is None:
        yield first, _convert(cut, rows)
        return
    inside = ((cut.rows >= first) & (cut.rows < first + len(rows))).nonzero().flatten()
    if len(inside):
        part = _convert(cut, _take(rows, cut.rows[inside] - first, 0))
        breaks = (inside.diff() != 1).nonzero().flatten() + 1
        start = 0
        for stretch in inside.tensor_split(breaks):
            yield int(stretch[0]), part[start : start + len(stretch)]
            start += len(stretch)


def _convert(cut: Cut, rows: Tensor) -> Tensor:
    if cut.columns is not None:
        rows = _take(rows, cut.columns, 1)
    return rows.to(cut.dtype).contiguous()


def _take(tensor: Tensor, positions: Tensor, dim: int) -> Tensor:
    """``index_select`` by whole stretches: lanes are long, and copies of stretches as fast as memory."""
    breaks = (positions.diff() != 1).nonzero().flatten() + 1
    if len(breaks) >= _STRETCHES:
        return tensor.index_select(dim, positions)
    parts = [tensor.narrow(dim, int(p[0]), len(p)) for p in positions.tensor_split(breaks)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
