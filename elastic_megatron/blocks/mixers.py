"""The two stock classes whose mathematics has no leaf to hook: Mamba's convolution and the moe_router."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import lcm
from typing import Any

import torch
from megatron.core.ssm.mamba_context_parallel import MambaContextParallel
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from ..space import ElasticSpace
from .binding import Binding

# algorithms whose statistics assume the same experts in every micro-batch
_WHOLE_EXPERT_SET = {"sinkhorn", "quantile_balancing", "global_aux_loss"}
# parts in which a soft depth is counted: products with whole counts, and their sums, are exact in fp64
_KEEP_UNIT = 1 << 20


class _MaskedConv(MambaContextParallel):
    """Hands out convolution parameters with the cut SSM states of C masked.

    Weight and bias are both masked: silu(0) = 0, so a cut state of C is exactly zero after the convolution,
    also inside the fused kernel.
    """

    binding: Binding

    def get_conv1d_weight(self) -> Tensor:
        return self._masked(self.conv1d_weight_cp1)

    def get_conv1d_bias(self) -> Tensor:
        return self._masked(self.conv1d_bias_cp1)

    def _masked(self, param: Tensor) -> Tensor:
        mask = self.binding.get("conv")
        if mask is not None:
            param = param * mask.to(param.dtype).view(-1, *([1] * (param.dim() - 1)))
        return self._slice_conv_param(param)


@contextmanager
def _shadowed(module: nn.Module, **tensors: Tensor) -> Iterator[None]:
    """Stand-ins for parameters or buffers during one call: ``__dict__`` is looked up before them."""
    module.__dict__.update(tensors)
    try:
        yield
    finally:
        for name in tensors:
            del module.__dict__[name]


class ElasticMambaMixer(MambaMixer):
    """``MambaMixer`` whose convolution parameters pass through the bound mask."""

    def bind(self, binding: Binding) -> None:
        masked = _MaskedConv.__new__(_MaskedConv)
        masked.__dict__.update(self.cp.__dict__)
        masked.binding = binding
        self.cp = masked

    def _ssm_decode(self, *args: Any, **kwargs: Any) -> Tensor:
        """A decoding step, which reads the parameters themselves and not what ``cp`` hands out."""
        weight, bias = self.cp.get_conv1d_weight(), self.cp.get_conv1d_bias()
        with _shadowed(self, conv1d_weight=weight, conv1d_bias=bias):
            return super()._ssm_decode(*args, **kwargs)


class ElasticTopKRouter(TopKRouter):
    """``TopKRouter`` that knows which experts a micro-batch has.

    With a keep-probability m per expert, ``log m`` is added to the logits: sigmoid and softmax scores, the
    z-loss and the statistics of the auxiliary losses then see exactly the kept experts, m = 1 changes
    nothing, m = 0 removes an expert, and in between the gradient reaches the budget router. Where m = 0 the
    correction bias becomes -inf as well: a score of 0 would still win against kept experts whose
    score + bias is negative.
    """

    binding: Binding | None = None
    count_unit: int = 1

    def bind(self, binding: Binding, space: ElasticSpace) -> None:
        kinds = [self.routing_type] if isinstance(self.routing_type, str) else self.routing_type
        if _WHOLE_EXPERT_SET & set(kinds) or self.config.moe_router_fusion:
            raise ValueError(
                f"moe_router_load_balancing_type={self.routing_type!r} (fused: "
                f"{self.config.moe_router_fusion}) cannot leave experts out; use 'none', 'aux_loss' or "
                "'seq_aux_loss' unfused"
            )
        if self.config.moe_router_num_groups:
            raise ValueError("group-limited routing cannot be cut by experts; unset moe_router_num_groups")
        self.binding = binding
        if "num_moe_experts" in space.axes:
            self.count_unit = lcm(*space.choices_of("num_moe_experts"))

    def _kept(self) -> Tensor | None:
        return self.binding.get("experts") if self.binding is not None else None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> Any:
        kept = self._kept()
        if kept is None:
            return super().routing(logits, padding_mask)
        alive = kept > 0
        tiny = torch.finfo(kept.dtype).tiny
        log_kept = torch.where(alive, kept.clamp_min(tiny).log(), float("-inf"))
        with self._bias_of(alive):
            return super().routing(logits + log_kept.to(logits.dtype), padding_mask)

    def _bias_of(self, alive: Tensor) -> AbstractContextManager[None]:
        if self.expert_bias is None:
            return nullcontext()
        return _shadowed(self, expert_bias=torch.where(alive, self.expert_bias, float("-inf")))

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count tokens so that an expert absent from a micro-batch is neither over- nor underloaded.

        The update rule compares each count with the mean over all experts. Taking from each count the fair
        share among the experts that were present makes the mean 0 and turns that comparison into count
        against fair share; it stays additive over micro-batches and ranks. A dropped layer counts nothing.

        Tokens are counted in units of 1 / ``count_unit``, of which every fair share is a whole number: sums
        in fp64 are then exact, and the sign that moves a bias is the same for every parallel layout.
        """
        kept = self._kept()
        keep = self.binding.get("keep") if self.binding is not None else None
        if (kept is None and keep is None) or not (self.enable_expert_bias and torch.is_grad_enabled()):
            super()._apply_expert_bias(routing_map, padding_mask)
            return
        # a buffer of its own, since precision wrappers cast Megatron's
        before = self.local_tokens_per_expert.double()
        self.local_tokens_per_expert = torch.zeros_like(before)
        super()._apply_expert_bias(routing_map, padding_mask)
        with torch.no_grad():
            count = self.local_tokens_per_expert
            if kept is not None:
                count = _excess(count, kept > 0, self.count_unit)
            if keep is not None:
                # in whole parts, or the order of a sum would decide the sign of what is 0
                count = count * (keep.to(count) * _KEEP_UNIT).round() / _KEEP_UNIT
            self.local_tokens_per_expert = before + count

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss is E * sum(f * P): E becomes the number of kept experts, and a dropped layer has none.

        It weighs as much as the rest of the micro-batch's loss.
        """
        kept = self._kept()
        if kept is not None:
            aux_loss = aux_loss * (kept.detach().sum() / kept.numel())
        keep = self.binding.get("keep") if self.binding is not None else None
        if keep is not None:
            aux_loss = aux_loss * keep.detach()
        if self.binding is not None and self.binding.widths is not None:
            aux_loss = aux_loss * self.binding.widths.weight
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, *args, **kwargs
        )


def _excess(count: Tensor, present: Tensor, unit: int) -> Tensor:
    """[experts] fp64: tokens above the fair share among the experts that are present, times ``unit``.

    ``unit`` is a multiple of the number of experts that are present, so every value is a whole number. Where a mix that
    is not finite has none, no expert has a share.
    """
    share = count.sum() * (unit // present.sum().clamp_min(1))
    return unit * count - share * present
