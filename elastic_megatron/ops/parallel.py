"""Small operations between ranks. A group is an argument: ``None`` or a group of one rank communicates nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UserError


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``, whose gradient is multiplied by ``factor``."""
    return _ScaleGradient.apply(x, factor)


def sum_over(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of the ranks' ``x``, on every rank; each rank's gradient is that of its own ``x``.

    For terms of a loss: every rank computes the same loss from the sum, so the gradient that arrives is already
    whole on each of them, and adding them up would count it once per rank.
    """
    return x if group_size(group) == 1 else _SumOver.apply(x, group)


def group_size(group: dist.ProcessGroup | None) -> int:
    """Ranks of a group; 1 where there is none."""
    return 1 if group is None else group.size()


def zigzag(x: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """The part of a sequence that context-parallel rank ``rank`` of ``size`` holds.

    Of ``2 * size`` equal chunks these are number ``rank`` and number ``rank`` from the end, in this order, which
    gives every rank the same work under a causal mask (``get_batch_on_this_cp_rank`` of Megatron).

    Raises:
        UserError: the sequence does not divide into the chunks.
    """
    if size == 1:
        return x
    if x.shape[dim] % (2 * size):
        raise UserError(
            f"sequence length {x.shape[dim]} does not divide into {2 * size} chunks for {size} context-parallel "
            f"ranks; make it a multiple of {2 * size}"
        )
    chunks = x.chunk(2 * size, dim)
    return torch.cat((chunks[rank], chunks[-1 - rank]), dim)


def zigzag_order(length: int, size: int) -> Tensor:
    """Place in the whole sequence of every position of the ranks' parts, one part after another: ``[length]``.

    With it, ``whole[order] = torch.cat(parts)`` undoes :func:`zigzag`.

    Raises:
        UserError: as :func:`zigzag`.
    """
    places = torch.arange(length)
    return torch.cat([zigzag(places, 0, rank, size) for rank in range(size)])


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
