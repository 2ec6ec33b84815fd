"""Distillation losses on logits, whole or cut along the vocabulary; logits are never gathered.

They take all logits at once: the slow truth that training's ``chunked_kd`` is compared with.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .parallel import group_size, sum_over


def distillation_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    kind: str,
    temperature: float,
    ce_weight: float,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Loss of every token, and its distillation part.

    ``forward_kl`` is KL(teacher || student), ``reverse_kl`` the other direction, both over the full
    vocabulary at ``temperature`` without the T^2 factor (NVIDIA ModelOpt's convention); ``ce_weight`` w mixes
    ``(1 - w) * KL + w * CE``. ``cross_entropy`` ignores the teacher.

    Args:
        student, teacher: logits ``[..., vocabulary / ranks]``, rank ``r`` of ``group`` holding the ``r``-th of its
            equal parts; the teacher's carry no gradient.
        labels: token ids ``[...]`` in the whole vocabulary, the same on every rank.
        group: the tensor-parallel ranks that share the vocabulary; ``None`` where the logits are whole.

    Returns:
        ``(loss [...], kd [...] | None)`` in fp32 or better, in nats, the same on every rank. The gradient of each
        rank's logits is its part of that of whole logits.
    """
    if kind == "cross_entropy" or teacher is None:
        return token_cross_entropy(student, labels, group), None
    log_q = _log_softmax(student, temperature, group)
    log_p = _log_softmax(teacher.detach(), temperature, group)
    kd = _kl(log_p, log_q, group) if kind == "forward_kl" else _kl(log_q, log_p, group)
    if ce_weight == 0.0:
        return kd, kd
    if temperature != 1.0:
        log_q = _log_softmax(student, 1.0, group)
    return (1 - ce_weight) * kd + ce_weight * _cross_entropy(log_q, labels, group), kd


def token_cross_entropy(logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Cross-entropy of every token ``[...]`` in nats; arguments as in :func:`distillation_loss`."""
    return _cross_entropy(_log_softmax(logits, 1.0, group), labels, group)


def _kl(log_p: Tensor, log_q: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    return sum_over((log_p.exp() * (log_p - log_q)).sum(-1), group)


def place_in_part(labels: Tensor, part: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Where labels lie in this rank's ``part`` entries of the vocabulary: index, and whether they do at all.

    The index of one that lies with another rank is 0. An id outside the whole vocabulary is nobody's and keeps an index
    outside the part, so that ``gather`` refuses it on every rank.
    """
    ranks = group_size(group)
    rank = group.rank() if group is not None else 0
    elsewhere = (labels // part != rank) & (labels >= 0) & (labels < ranks * part)
    return (labels - rank * part).masked_fill(elsewhere, 0), ~elsewhere


def _cross_entropy(log_q: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    index, mine = place_in_part(labels, log_q.shape[-1], group)
    own = log_q.gather(-1, index.unsqueeze(-1)).squeeze(-1).masked_fill(~mine, 0.0)
    return sum_over(-own, group)


def _log_softmax(logits: Tensor, temperature: float, group: dist.ProcessGroup | None) -> Tensor:
    """Log-probabilities of this rank's part of the vocabulary, in fp32 or better."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        wide = wide / temperature
    return torch.log_softmax(wide, dim=-1) if group_size(group) == 1 else _LogSoftmax.apply(wide, group)


class _LogSoftmax(torch.autograd.Function):
    """Log-softmax over a last dimension that is cut into the group's equal parts."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        top = logits.amax(-1, keepdim=True)
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        shifted = logits - top
        total = shifted.exp().sum(-1, keepdim=True)
        dist.all_reduce(total, group=group)
        out = shifted - total.log()
        ctx.group = group
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (out,) = ctx.saved_tensors
        total = grad.sum(-1, keepdim=True)
        dist.all_reduce(total, group=ctx.group)
        return grad - out.exp() * total, None
