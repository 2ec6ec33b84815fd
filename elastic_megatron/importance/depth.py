"""Importance of whole layers: how much the logits change when a layer is left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import forward_only
from ..blocks.forward import Batch
from .scores import wide

_ROWS = 1024


class _Skipped(nn.Module):
    """Stands in for a layer: the residual stream passes unchanged."""

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


@contextmanager
def without(chunks: Sequence[Any], layers: Sequence[int]) -> Iterator[None]:
    """Forward passes inside this context skip ``layers`` of the whole model and spend no time on them."""
    kept = [
        (chunk.decoder.layers, j, layer)
        for chunk in chunks
        for j, layer in enumerate(chunk.decoder.layers)
        if layer.layer_number - 1 in layers
    ]
    for place, j, layer in kept:
        place[j] = _Skipped(layer.layer_number)
    try:
        yield
    finally:
        for place, j, layer in kept:
            place[j] = layer


def runs(batches: Iterable[Batch], length: int) -> Iterator[list[Batch]]:
    """Consecutive batches of one shape, at most ``length`` at a time."""
    run: list[Batch] = []
    for batch in batches:
        if run and (len(run) == length or batch["tokens"].shape != run[0]["tokens"].shape):
            yield run
            run = []
        run.append(batch)
    if run:
        yield run


def squared_error(reference: Tensor, other: Tensor) -> Tensor:
    """[2] float64: sum of (reference - other)^2 and sum of reference^2, in chunks of rows of the logits."""
    total = torch.zeros(2, dtype=torch.float64, device=reference.device)
    pairs = zip(reference.flatten(0, -2).split(_ROWS), other.flatten(0, -2).split(_ROWS), strict=True)
    for a, b in pairs:
        a, b = wide(a), wide(b)
        total[0] += (a - b).square().sum(dtype=torch.float64)
        total[1] += a.square().sum(dtype=torch.float64)
    return total


def depth_ranking(
    chunks: Sequence[Any], batches: Sequence[Batch], *, layers: int, iterative: bool
) -> tuple[Tensor, list[int]]:
    """nMSE of the logits without each layer, and the layers by decreasing importance (arXiv 2511.16664).

    nMSE = sum (M_full - M_without)^2 / sum M_full^2. Iterative: the least important layer is dropped for
    good and the others are measured again without it, O(L^2) forward passes; a layer's score is then the
    nMSE at the moment it was dropped, all earlier ones missing too, and the order is the reverse of the
    order of dropping. Otherwise every layer is left out alone, L forward passes a batch.

    Args:
        chunks: this rank's pipeline chunks, bare.
        batches: as ``forward_only`` takes them.
        layers: of the whole model.

    Returns:
        Scores [layers] float64 on the CPU, and the order; the same on every rank.
    """
    scores = torch.zeros(layers, dtype=torch.float64)
    if not iterative:
        scores[:] = _errors(chunks, batches, list(range(layers)), [])
        return scores, scores.sort(descending=True, stable=True).indices.tolist()
    dropped: list[int] = []
    while len(dropped) < layers:
        candidates = [j for j in range(layers) if j not in dropped]
        errors = _errors(chunks, batches, candidates, dropped)
        # of equally unimportant layers the last goes first, so that ties end up ordered by index
        best = len(candidates) - 1 - int(errors.flip(0).argmin())
        scores[candidates[best]] = errors[best]
        dropped.append(candidates[best])
    return scores, dropped[::-1]


def _errors(
    chunks: Sequence[Any],
    batches: Sequence[Batch],
    candidates: Sequence[int],
    dropped: Sequence[int],
) -> Tensor:
    """[candidates] float64 on the CPU: nMSE without ``dropped`` and each candidate, over all ranks."""
    device = next(chunks[0].parameters()).device
    sums = torch.zeros(len(candidates), 2, dtype=torch.float64, device=device)
    # as many batches at once as fill the pipeline: their full logits are kept
    for run in runs(batches, chunks[0].pg_collection.pp.size()):
        full = forward_only(chunks, run, lambda _, logits: logits)
        for row, j in enumerate(candidates):
            with without(chunks, [*dropped, j]):
                sums[row] += _difference(chunks, run, full)
    torch.distributed.all_reduce(sums)
    sums = sums.cpu()
    return sums[:, 0] / sums[:, 1]


def _difference(chunks: Sequence[Any], batches: Sequence[Batch], full: Sequence[Tensor]) -> Tensor:
    """[2] float64: ``squared_error`` of the batches' logits, those of the whole model being ``full``."""
    total = torch.zeros(2, dtype=torch.float64, device=next(chunks[0].parameters()).device)
    reference = iter(full)
    forward_only(chunks, batches, lambda _, logits: total.add_(squared_error(next(reference), logits)))
    return total
