"""The raw sums of a calibration pass, and the scores they become."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import prod

import torch
from torch import Tensor

from ..space import ParentShape, axis
from .reap import reap_score
from .scores import head_dim_score, mamba_head_score, query_head_score, state_score

Where = tuple[slice | int, ...]
_MAMBA_CHANNELS = ("mamba_num_heads", "mamba_head_dim")
_ACTIVATION_SUMS = ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")


def sum_shapes(parent: ParentShape, axes: Collection[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every raw sum that the scores of ``axes`` are made of, in a fixed order."""
    if "hidden_size" in axes:
        yield "hidden_size", (parent.hidden_size,)
    for i, symbol in enumerate(parent.hybrid_layer_pattern):
        own = {a for a in axes if axis(a).symbol == symbol}
        if own.intersection(_MAMBA_CHANNELS):
            yield f"layers.{i}.mamba_channels", (parent.mamba_num_heads, parent.mamba_head_dim)
        if "mamba_state_dim" in own:
            yield f"layers.{i}.mamba_states", (2, parent.mamba_num_groups, parent.mamba_state_dim)
        if "num_attention_heads" in own:
            rows = parent.num_attention_heads + 2 * parent.num_query_groups
            yield f"layers.{i}.qkv_rows", (rows * parent.kv_channels,)
        if "num_moe_experts" in own:
            yield f"layers.{i}.expert_outputs", (parent.num_moe_experts,)
            yield f"layers.{i}.expert_tokens", (parent.num_moe_experts,)
        for a in _ACTIVATION_SUMS:
            if a in own:
                experts = (parent.num_moe_experts,) if a == "moe_ffn_hidden_size" else ()
                yield f"layers.{i}.{a}", (*experts, parent.size(a))


class Sums:
    """Float64 accumulators on the activations' device, zero at first, of the whole model on every rank.

    Every rank adds what it computes at the place where it belongs, and no two ranks add the same thing, so one
    sum over the world gives the totals whatever the layout.
    """

    def __init__(self, parent: ParentShape, axes: Collection[str], device: torch.device) -> None:
        shapes = dict(sum_shapes(parent, axes))
        self._all = torch.zeros(sum(map(prod, shapes.values())), dtype=torch.float64, device=device)
        parts = self._all.split([prod(shape) for shape in shapes.values()])
        self.raw = {key: part.view(shapes[key]) for key, part in zip(shapes, parts, strict=True)}

    def add(self, key: str, value: Tensor, where: Where = ()) -> None:
        """Add to a sum, or to the part of it at ``where``."""
        target = self.raw[key][where]
        assert target.shape == value.shape, f"{key}: {tuple(value.shape)} for {tuple(target.shape)}"
        target += value

    def totals(self) -> dict[str, Tensor]:
        """The sums over all ranks of the world, on the CPU; collective, and once at the end."""
        torch.distributed.all_reduce(self._all)
        return {key: value.cpu() for key, value in self.raw.items()}


def scores_of(
    raw: dict[str, Tensor], parent: ParentShape, axes: Collection[str], head_dim_kept: int | None
) -> dict[str, Tensor]:
    """Scores under the keys of a ``Ranking``, from sums named as in ``sum_shapes``."""
    scores = {"hidden_size": raw["hidden_size"]} if "hidden_size" in axes else {}
    for i, symbol in enumerate(parent.hybrid_layer_pattern):
        for a in axes:
            if axis(a).symbol == symbol:
                scores[f"layers.{i}.{a}"] = _layer_score(raw, f"layers.{i}.", a, parent, head_dim_kept)
    return scores


def _layer_score(
    raw: dict[str, Tensor], layer: str, axis_name: str, parent: ParentShape, head_dim_kept: int | None
) -> Tensor:
    if axis_name == "num_moe_experts":
        return reap_score(raw[layer + "expert_outputs"], raw[layer + "expert_tokens"])
    if axis_name == "mamba_head_dim":
        return head_dim_score(raw[layer + "mamba_channels"])
    if axis_name == "mamba_num_heads":
        return mamba_head_score(raw[layer + "mamba_channels"], head_dim_kept)
    if axis_name == "mamba_state_dim":
        return state_score(raw[layer + "mamba_states"])
    if axis_name == "num_attention_heads":
        return query_head_score(raw[layer + "qkv_rows"], parent)
    return raw[layer + axis_name]
