"""Importance of whole layers: how much the logits change when a layer is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .scores import wide
from .sums import Reduce

Batch = Mapping[str, Any]
_ROWS = 1024


class _Skipped(nn.Module):
    """Stands in for a layer: the residual stream passes unchanged."""

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


@contextmanager
def without(decoder: Any, layers: Sequence[int]) -> Iterator[None]:
    """Forward passes inside this context skip ``layers`` and spend no time on them."""
    kept = {j: decoder.layers[j] for j in layers}
    for j, layer in kept.items():
        decoder.layers[j] = _Skipped(layer.layer_number)
    try:
        yield
    finally:
        for j, layer in kept.items():
            decoder.layers[j] = layer


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
    logits: Callable[[Batch], Tensor],
    decoder: Any,
    batches: Sequence[Batch],
    *,
    iterative: bool,
    reduce: Reduce,
) -> tuple[Tensor, list[int]]:
    """nMSE of the logits without each layer, and the layers by decreasing importance (arXiv 2511.16664).

    nMSE = sum (M_full - M_without)^2 / sum M_full^2. Iterative: the least important layer is dropped for
    good and the others are measured again without it, O(L^2) forward passes; a layer's score is then the
    nMSE at the moment it was dropped, all earlier ones missing too, and the order is the reverse of the
    order of dropping. Otherwise every layer is left out alone, L forward passes a batch.

    Args:
        logits: the forward pass of the model that owns ``decoder``.
        reduce: sums the [candidates, 2] squared errors over ranks; every rank must get the same numbers.

    Returns:
        Scores [layers] float64 on the CPU, and the order.
    """
    count = len(decoder.layers)
    scores = torch.zeros(count, dtype=torch.float64)
    if not iterative:
        scores[:] = _errors(logits, decoder, batches, list(range(count)), [], reduce)
        return scores, scores.sort(descending=True, stable=True).indices.tolist()
    dropped: list[int] = []
    while len(dropped) < count:
        candidates = [j for j in range(count) if j not in dropped]
        errors = _errors(logits, decoder, batches, candidates, dropped, reduce)
        # of equally unimportant layers the last goes first, so that ties end up ordered by index
        best = len(candidates) - 1 - int(errors.flip(0).argmin())
        scores[candidates[best]] = errors[best]
        dropped.append(candidates[best])
    return scores, dropped[::-1]


def _errors(
    logits: Callable[[Batch], Tensor],
    decoder: Any,
    batches: Sequence[Batch],
    candidates: Sequence[int],
    dropped: Sequence[int],
    reduce: Reduce,
) -> Tensor:
    """[candidates] float64 on the CPU: nMSE without ``dropped`` and each candidate."""
    sums: Tensor | None = None
    for batch in batches:
        full = logits(batch)
        rows = []
        for j in candidates:
            with without(decoder, [*dropped, j]):
                rows.append(squared_error(full, logits(batch)))
        sums = torch.stack(rows) if sums is None else sums + torch.stack(rows)
    assert sums is not None, "depth needs a batch"
    total = reduce(sums).cpu()
    return total[:, 0] / total[:, 1]
