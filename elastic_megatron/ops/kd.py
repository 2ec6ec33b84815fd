"""Distillation losses on logits."""

from __future__ import annotations

import torch
from torch import Tensor


def distillation_loss(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    kind: str,
    temperature: float,
    ce_weight: float,
) -> tuple[Tensor, Tensor | None]:
    """Loss of every token, and its distillation part.

    ``forward_kl`` is KL(teacher || student), ``reverse_kl`` the other direction, both over the full
    vocabulary at ``temperature`` without the T^2 factor (NVIDIA ModelOpt's convention); ``ce_weight`` w mixes
    ``(1 - w) * KL + w * CE``. ``cross_entropy`` ignores the teacher.

    Args:
        student, teacher: logits ``[..., vocabulary]``; the teacher's carry no gradient.
        labels: token ids ``[...]``.

    Returns:
        ``(loss [...], kd [...] | None)`` in fp32 or better.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    log_q = torch.log_softmax(student.to(wide), dim=-1)
    if kind == "cross_entropy" or teacher is None:
        return _cross_entropy(log_q, labels), None
    log_q_t = log_q if temperature == 1.0 else torch.log_softmax(student.to(wide) / temperature, dim=-1)
    log_p = torch.log_softmax(teacher.detach().to(wide) / temperature, dim=-1)
    a, b = (log_p, log_q_t) if kind == "forward_kl" else (log_q_t, log_p)
    kd = (a.exp() * (a - b)).sum(-1)
    if ce_weight == 0.0:
        return kd, kd
    return (1 - ce_weight) * kd + ce_weight * _cross_entropy(log_q, labels), kd


def _cross_entropy(log_q: Tensor, labels: Tensor) -> Tensor:
    return -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
