"""Distillation losses from hidden states: of the logits, and of their gradient, one chunk of tokens exists at a time.

Values and gradients are those of :func:`~elastic_megatron.ops.kd.distillation_loss`, the slow truth, on the logits
``hidden @ weight.T``. Of every chunk the ranks that share the vocabulary exchange two messages: the maxima, and the
sums packed into one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..cost.loss_memory import PRODUCTS, chunk_of
from .logit_block import LogitBlock, Objective
from .top_block import TopBlock, TopLogits

_Sums = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Projection:
    """Hidden states, and the weight that makes logits of them: ``hidden @ weight.T``.

    Args:
        hidden: ``[..., channels]``.
        weight: ``[vocabulary / ranks, channels]``, rank ``r`` holding the ``r``-th of equal parts.
    """

    hidden: Tensor
    weight: Tensor

    def rows(self) -> tuple[Tensor, Tensor]:
        """Hidden states of one token a row, and the weight."""
        return self.hidden.reshape(-1, self.hidden.shape[-1]), self.weight


def chunked_distillation_loss(
    student: Projection,
    teacher: Projection | TopLogits | None,
    labels: Tensor,
    loss_mask: Tensor,
    *,
    kind: str,
    temperature: float,
    ce_weight: float,
    group: dist.ProcessGroup | None = None,
    chunk: int | None = None,
    recompute: bool = False,
) -> _Sums:
    """The sum over tokens of the loss, and that of its distillation part, each weighted by ``loss_mask``.

    Args:
        teacher: gets no gradient; without one the loss is the cross-entropy. Of ``TopLogits`` at ``temperature`` the
            divergence is that of their k + 1 outcomes.
        labels: token ids ``[...]`` in the whole vocabulary, the same on every rank.
        loss_mask: weights ``[...]``, the same on every rank.
        kind, temperature, ce_weight, group: as of :func:`~elastic_megatron.ops.kd.distillation_loss`.
        chunk: tokens whose logits exist at a time; default: ``cost.loss_memory.chunk_of``.
        recompute: make the logits again for the backward pass. Otherwise the gradients are computed together with the
            loss, which saves two of six products, and are kept until then: one of the weight, one of the hidden states.

    Returns:
        ``(loss, kd | None)`` in fp32 or better, in nats, the same on every rank; only the loss has a gradient.
        The gradient of ``hidden`` is what the rank's part of the vocabulary adds to it: the caller sums them over
        ``group``. That of the weight is added up over chunks in fp32 or better.
    """
    how = _objective(teacher, kind, temperature, ce_weight, group)
    tensors = _tensors(student, teacher, how)
    mask = loss_mask.reshape(-1)
    if torch.is_grad_enabled() and (student.hidden.requires_grad or student.weight.requires_grad):
        return _Loss.apply(*tensors, labels.reshape(-1), mask, how, chunk, recompute)
    with torch.no_grad():
        return _summed(_Chunks(how, *tensors, chunk).run(labels.reshape(-1)), mask)


@torch.no_grad()
def chunked_token_losses(
    student: Projection,
    teacher: Projection | TopLogits | None,
    labels: Tensor,
    *,
    kind: str,
    temperature: float,
    ce_weight: float,
    group: dist.ProcessGroup | None = None,
    chunk: int | None = None,
) -> _Sums:
    """Loss of every token, and its distillation part, ``[...]`` each; arguments as above. Without gradients."""
    how = _objective(teacher, kind, temperature, ce_weight, group)
    loss, kd = _Chunks(how, *_tensors(student, teacher, how), chunk).run(labels.reshape(-1))
    return loss.view(labels.shape), None if kd is None else kd.view(labels.shape)


def _objective(
    teacher: Projection | TopLogits | None,
    kind: str,
    temperature: float,
    ce_weight: float,
    group: dist.ProcessGroup | None,
) -> Objective:
    top = isinstance(teacher, TopLogits)
    return Objective.of(kind, temperature, ce_weight, group, taught=teacher is not None, top=top)


def _tensors(
    student: Projection, teacher: Projection | TopLogits | None, how: Objective
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    if teacher is None or not how.distils:
        return (*student.rows(), None, None)
    first, second = teacher.rows()
    return (*student.rows(), first.detach(), second.detach())


def _summed(losses: _Sums, mask: Tensor) -> _Sums:
    loss, kd = losses
    return (loss * mask).sum(), None if kd is None else (kd * mask).sum()


class _Loss(torch.autograd.Function):
    """The gradient that arrives is one number: so what it multiplies can be known before."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, of_teacher: Tensor | None, and_teacher: Tensor | None,
        labels: Tensor, mask: Tensor, how: Objective, chunk: int | None, recompute: bool,
    ) -> _Sums:  # fmt: skip
        ctx.how, ctx.chunk, ctx.recompute, ctx.gradients = how, chunk, recompute, None
        chunks = _Chunks(how, hidden, weight, of_teacher, and_teacher, chunk)
        if recompute:
            ctx.save_for_backward(hidden, weight, of_teacher, and_teacher, labels, mask)
            loss, kd = _summed(chunks.run(labels), mask)
        else:
            loss, kd = _summed(chunks.run(labels, mask, *ctx.needs_input_grad[:2]), mask)
            ctx.gradients = chunks.gradients()
        if kd is not None:
            ctx.mark_non_differentiable(kd)
        return loss, kd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.recompute:
            *tensors, labels, mask = ctx.saved_tensors
            chunks = _Chunks(ctx.how, *tensors, ctx.chunk)
            chunks.run(labels, mask * upstream, *ctx.needs_input_grad[:2])
            return (*chunks.gradients(), *[None] * 7)
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, (
            "an earlier backward pass was given the gradients; recompute makes them again"
        )
        return (*(None if g is None else g.mul_(upstream) for g in gradients), *[None] * 7)


class _Chunks:
    """A pass over all tokens, in rooms of one chunk.

    Args:
        hidden: [n, channels].
        weight: [V, channels].
        of_teacher, and_teacher: its hidden states and weight; of ``TopLogits`` ids and log-probabilities.
        chunk: tokens.
    """

    def __init__(
        self, how: Objective, hidden: Tensor, weight: Tensor, of_teacher: Tensor | None,
        and_teacher: Tensor | None, chunk: int | None,
    ) -> None:  # fmt: skip
        self.how, self.hidden, self.weight = how, hidden, weight
        self.teacher = of_teacher, and_teacher
        self.wide = torch.promote_types(hidden.dtype, torch.float32)
        self.chunk = min(chunk or chunk_of(hidden.shape[-1]), len(hidden))
        room = self.chunk, len(weight)
        self.rooms = [hidden.new_empty(room, dtype=self.wide) for _ in range(how.rooms)]
        self.narrow = hidden.new_empty(self.chunk, len(weight)) if hidden.dtype != self.wide else None
        self.of_hidden: Tensor | None = None
        self.of_weight: Tensor | None = None

    def run(
        self, labels: Tensor, weights: Tensor | None = None, by_hidden: bool = False, by_weight: bool = False
    ) -> _Sums:
        """Loss and divergence [n] of every token; and what is asked for of the gradient of their weighted sum."""
        if by_hidden:
            self.of_hidden = torch.empty_like(self.hidden)
        if by_weight:
            self.of_weight = self.weight.new_zeros(self.weight.shape, dtype=self.wide)
        found = []
        for start in range(0, len(self.hidden), self.chunk):
            rows = slice(start, start + self.chunk)
            block = self._block(rows, labels[rows])
            found.append(block.losses())
            if weights is not None:
                self._back(rows, block.gradient(weights[rows].to(self.wide)))
        losses, divergences = zip(*found, strict=True)
        return torch.cat(losses), torch.cat(divergences) if self.how.distils else None

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of hidden states and weight, in their types; the pass is over."""
        self.rooms.clear()
        self.narrow = None
        of_weight, self.of_weight = self.of_weight, None
        return self.of_hidden, None if of_weight is None else of_weight.to(self.weight.dtype)

    def _block(self, rows: slice, labels: Tensor) -> LogitBlock | TopBlock:
        student, *others = (room[: len(labels)] for room in self.rooms)
        self._project(self.hidden[rows], self.weight, student)
        first, second = self.teacher
        if first is not None and second is not None:
            if self.how.top:
                return TopBlock(self.how, student, tuple(others), labels, first[rows], second[rows])
            self._project(first[rows], second, others[0])
        return LogitBlock(self.how, student, tuple(others), labels)

    def _project(self, hidden: Tensor, weight: Tensor, room: Tensor) -> None:
        """Logits over the temperature; in the model's type first, as the output layer makes them."""
        scale = 1 / self.how.temperature
        if self.narrow is None:
            room.addmm_(hidden, weight.t(), beta=0, alpha=scale)
            return
        room.copy_(torch.mm(hidden, weight.t(), out=self.narrow[: len(room)]))
        if scale != 1.0:
            room.mul_(scale)

    def _back(self, rows: slice, of_logits: Tensor) -> None:
        """From the gradient of a chunk's logits to that of its hidden states, and the chunk's part of the weight's."""
        if self.narrow is not None:
            of_logits = self.narrow[: len(of_logits)].copy_(of_logits)
        if self.of_hidden is not None:
            torch.mm(of_logits, self.weight, out=self.of_hidden[rows])
        if self.of_weight is None:
            return
        hidden = self.hidden[rows]
        if self.narrow is None:
            self.of_weight.addmm_(of_logits.t(), hidden)
            return
        # products come in the narrow type: a part of the vocabulary at a time, each added at once
        parts = zip(
            *(x.chunk(PRODUCTS, dim) for x, dim in ((self.of_weight, 0), (of_logits, 1))), strict=True
        )
        for of_part, of_entries in parts:
            of_part.add_(torch.mm(of_entries.t(), hidden))
