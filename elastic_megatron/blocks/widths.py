"""What one layer needs to know of a mix: its masks and the scales of its norms.

A component is masked once, where it would otherwise mix with others (design, section 5): what a layer writes
to the residual stream; the gated norm for Mamba heads and their channels; C's convolution for SSM states;
the input of ``linear_proj`` for query heads and of ``linear_fc2`` for feed-forward channels; the selection
score for experts. ``None`` means that the axis is not elastic and nothing is multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.mix import SubmodelMix


@dataclass(frozen=True)
class Shard:
    """Which of ``size`` equal parts of a sharded axis a rank holds. Whole lanes, so every part is alike."""

    rank: int = 0
    size: int = 1

    def of(self, mask: Tensor) -> Tensor:
        """This rank's part of a mask over a whole axis."""
        return mask.unflatten(0, (self.size, -1))[self.rank]


WHOLE = Shard()


@dataclass(frozen=True)
class LayerWidths:
    """Masks of one layer for one micro-batch, on one rank.

    A rank's gradient of a mask is that of what the rank computes: summed over all ranks it is the gradient of
    the mask. Hooks divide it where several ranks compute the same (``Binding.replicas``).

    Args:
        hidden_scale: 0-d, s = sqrt(d / d') of the input norm.
        write: [hidden_size], multiplies what the layer adds to the residual stream; the probability that the
            layer runs is part of it, and so is s: the stream carries what its norms take.
        channels: mask of this rank's part of the block's inner width in stored order (Mamba heads x channels
            with the s of their norm, query heads x ``kv_channels``, or feed-forward channels).
        channel_scale: 0-d, s of Mamba's gated norm, equal in every group since lanes cut groups evenly.
        conv: [this rank's convolution channels], ones but for the masked SSM states of C.
        shared: mask of this rank's channels of the shared expert.
        experts: [num_moe_experts], how much of each routed expert is kept.
        keep: 0-d, probability that the layer runs.
        weight: of the micro-batch's loss.
    """

    hidden_scale: Tensor | None = None
    write: Tensor | None = None
    channels: Tensor | None = None
    channel_scale: Tensor | None = None
    conv: Tensor | None = None
    shared: Tensor | None = None
    experts: Tensor | None = None
    keep: Tensor | None = None
    weight: float = 1.0


def hidden_scale(mix: SubmodelMix) -> Tensor | None:
    """s = sqrt(d / d'): a norm over d channels of s * x, times 1 / s, is the norm over the d' kept ones.

    mean_d((s x)^2) = s^2 / d * sum x^2 = mean_d'(x^2), so epsilon keeps its meaning: exact, no surgery.
    """
    if "hidden_size" not in mix.probs:
        return None
    return (mix.size("hidden_size") / mix.width("hidden_size")).sqrt()


def end_widths(mix: SubmodelMix) -> LayerWidths:
    """What holds outside the layers: ``write`` masks the embedding's output."""
    if mix.transparent:
        return LayerWidths()
    return LayerWidths(hidden_scale=hidden_scale(mix), write=_write(mix, None))


def _write(mix: SubmodelMix, keep: Tensor | None) -> Tensor | None:
    """What multiplies a write to the residual stream of a layer that runs with probability ``keep``."""
    scale = hidden_scale(mix)
    if scale is None:
        return keep
    hidden = mix.mask("hidden_size") * scale
    return hidden if keep is None else hidden * keep


def layer_widths(
    mix: SubmodelMix, layer: int, tensor: Shard = WHOLE, expert_tensor: Shard = WHOLE
) -> LayerWidths:
    """The widths of one layer of the parent (global index), on the rank with these shards."""
    parent = mix.space.parent
    symbol = parent.hybrid_layer_pattern[layer]
    position = parent.layers_of(symbol).index(layer)
    keep = mix.keep(layer)
    if mix.transparent:
        experts = _mask(mix, "num_moe_experts", position) if symbol == "E" else None
        return LayerWidths(experts=experts, keep=keep, weight=mix.weight)
    common: dict[str, Any] = {
        "hidden_scale": hidden_scale(mix), "write": _write(mix, keep), "keep": keep, "weight": mix.weight,
    }  # fmt: skip
    if symbol == "M":
        return LayerWidths(**common, **_mamba(mix, position, tensor))
    if symbol == "*":
        heads = _mask(mix, "num_attention_heads", position, tensor)
        return LayerWidths(
            **common, channels=None if heads is None else heads.repeat_interleave(parent.kv_channels)
        )
    if symbol == "-":
        return LayerWidths(**common, channels=_mask(mix, "ffn_hidden_size", position, tensor))
    return LayerWidths(
        **common,
        channels=_mask(mix, "moe_ffn_hidden_size", position, expert_tensor),
        shared=_mask(mix, "moe_shared_expert_intermediate_size", position, tensor),
        experts=_mask(mix, "num_moe_experts", position),
    )


def _mask(mix: SubmodelMix, axis: str, position: int, shard: Shard = WHOLE) -> Tensor | None:
    return shard.of(mix.mask(axis, position)) if axis in mix.probs else None


def _mamba(mix: SubmodelMix, position: int, tensor: Shard) -> dict[str, Tensor | None]:
    parent = mix.space.parent
    heads = _mask(mix, "mamba_num_heads", position, tensor)
    dims = _mask(mix, "mamba_head_dim", position)
    states = _mask(mix, "mamba_state_dim", position)
    all_heads, head_dim = mix.size("mamba_num_heads", position), mix.size("mamba_head_dim", position)
    local_heads, local_groups = all_heads // tensor.size, parent.mamba_num_groups // tensor.size
    out: dict[str, Tensor | None] = {}
    if heads is not None or dims is not None:
        like = mix.tensors()[0]
        ones = torch.ones(1, device=like.device, dtype=like.dtype)
        rows = heads if heads is not None else ones.expand(local_heads)
        cols = dims if dims is not None else ones.expand(head_dim)
        share = ones[0]
        if heads is not None:
            share = share * mix.width("mamba_num_heads", position) / all_heads
        if dims is not None:
            share = share * mix.width("mamba_head_dim", position) / head_dim
        out["channel_scale"] = share.rsqrt()
        out["channels"] = torch.outer(rows * out["channel_scale"], cols).flatten()
    if states is not None:
        kept = local_heads * head_dim + local_groups * mix.size("mamba_state_dim", position)
        out["conv"] = torch.cat([states.new_ones(kept), states.repeat(local_groups)])
    return out
