"""The two stock classes whose mathematics has no leaf to hook: Mamba's convolution and the moe_router."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.ssm.mamba_context_parallel import MambaContextParallel
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from .binding import Binding

# algorithms whose statistics assume the same experts in every micro-batch
_WHOLE_EXPERT_SET = {"sinkhorn", "quantile_balancing", "global_aux_loss"}


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


class ElasticMambaMixer(MambaMixer):
    """``MambaMixer`` whose convolution parameters pass through the bound mask."""

    def bind(self, binding: Binding) -> None:
        masked = _MaskedConv.__new__(_MaskedConv)
        masked.__dict__.update(self.cp.__dict__)
        masked.binding = binding
        self.cp = masked


class ElasticTopKRouter(TopKRouter):
    """``TopKRouter`` that knows which experts a micro-batch has.

    With a keep-probability m per expert, ``log m`` is added to the logits: sigmoid and softmax scores, the
    z-loss and the statistics of the auxiliary losses then see exactly the kept experts, m = 1 changes
    nothing, m = 0 removes an expert, and in between the gradient reaches the budget router. Where m = 0 the
    correction bias becomes -inf as well: a score of 0 would still win against kept experts whose
    score + bias is negative.
    """

    binding: Binding | None = None

    def bind(self, binding: Binding) -> None:
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

    @contextmanager
    def _bias_of(self, alive: Tensor) -> Iterator[None]:
        """Shadow the ``expert_bias`` buffer for one call: ``__dict__`` is looked up before the buffers."""
        if self.expert_bias is None:
            yield
            return
        self.__dict__["expert_bias"] = torch.where(alive, self.expert_bias, float("-inf"))
        try:
            yield
        finally:
            del self.__dict__["expert_bias"]

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count tokens so that an expert absent from a micro-batch is neither over- nor underloaded.

        The update rule compares each count with the mean over all experts. Taking from each count the fair
        share among the experts that were present makes the mean 0 and turns that comparison into count
        against fair share; it stays additive over micro-batches. A dropped layer counts nothing.
        """
        kept = self._kept()
        keep = self.binding.get("keep") if self.binding is not None else None
        if (kept is None and keep is None) or not (self.enable_expert_bias and torch.is_grad_enabled()):
            super()._apply_expert_bias(routing_map, padding_mask)
            return
        before = self.local_tokens_per_expert.clone()
        super()._apply_expert_bias(routing_map, padding_mask)
        with torch.no_grad():
            count = self.local_tokens_per_expert - before
            if kept is not None:
                count -= _fair_share(count, kept > 0)
            if keep is not None:
                count *= keep.to(count.dtype)
            self.local_tokens_per_expert.copy_(before + count)

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss is E * sum(f * P): E becomes the number of kept experts, and a dropped layer has none."""
        kept = self._kept()
        if kept is not None:
            aux_loss = aux_loss * (kept.detach().sum() / kept.numel())
        keep = self.binding.get("keep") if self.binding is not None else None
        if keep is not None:
            aux_loss = aux_loss * keep.detach()
        return super().attach_and_log_load_balancing_loss(
            activation, aux_loss_coeff, aux_loss, *args, **kwargs
        )


def _fair_share(count: Tensor, present: Tensor) -> Tensor:
    """[experts]: the tokens split evenly among the experts that are present, 0 where all of them are.

    In sixteenths of a token that sum to the tokens exactly: sums over experts and micro-batches then have no
    rounding error, whose sign would move the bias of an expert that no micro-batch had.
    """
    sixteenths = 16 * count.long().sum()
    number = present.sum()
    share = sixteenths // number + (present.cumsum(0) <= sixteenths % number)
    return torch.where(present.all(), 0, share * present).to(count.dtype) / 16
