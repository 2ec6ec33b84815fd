"""The elastic axes. Each is a Megatron ``TransformerConfig`` field, so a submodel is a config override."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One dimension of a model that submodels may shrink.

    ``symbol`` is the layer type that owns the axis (``M``, ``*``, ``E``, ``-``), empty for the two global
    ones. ``groups`` names the ``ParentShape`` field whose groups must keep equal shares: Mamba heads share
    B and C within their SSM group, query heads share keys and values within their KV group, so both are
    ranked and cut inside the group.
    """

    name: str
    symbol: str
    hf: str
    groups: str | None = None


AXES: tuple[Axis, ...] = (
    Axis("hidden_size", "", "hidden_size"),
    Axis("num_layers", "", "num_hidden_layers"),
    Axis("ffn_hidden_size", "-", "intermediate_size"),
    Axis("moe_ffn_hidden_size", "E", "moe_intermediate_size"),
    Axis("moe_shared_expert_intermediate_size", "E", "moe_shared_expert_intermediate_size"),
    Axis("num_moe_experts", "E", "n_routed_experts"),
    Axis("mamba_num_heads", "M", "mamba_num_heads", groups="mamba_num_groups"),
    Axis("mamba_head_dim", "M", "mamba_head_dim"),
    Axis("mamba_state_dim", "M", "ssm_state_size"),
    Axis("num_attention_heads", "*", "num_attention_heads", groups="num_query_groups"),
)
AXIS_NAMES: tuple[str, ...] = tuple(a.name for a in AXES)
_BY_NAME = {a.name: a for a in AXES}


def axis(name: str) -> Axis:
    """The axis of that name. Raises ``KeyError`` for an unknown one."""
    return _BY_NAME[name]
