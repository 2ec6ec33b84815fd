"""The shape of a parent model: everything needed to count, cut and build it, and nothing about training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import UserError
from .axes import axis
from .stated import MOST_EXPERTS, MOST_LAYERS, check_pattern, check_sizes, listed, shown, whole_number

SYMBOLS = "M*E-"

# nemotron_h config field <- ours, for the fields that are no elastic axis
_HF_FIELDS = {
    "vocab_size": "vocab_size",
    "mamba_num_groups": "n_groups",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "moe_router_topk": "num_experts_per_tok",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "conv_kernel": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "layernorm_epsilon": "layer_norm_epsilon",
    "max_position_embeddings": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
_HF_AXES = (
    "hidden_size",
    "ffn_hidden_size",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "num_moe_experts",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_state_dim",
    "num_attention_heads",
)
_HF_LAYER_TYPES = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "moe": "E",
    "mlp": "-",
}
# nemotron_h options that the blocks do not have: the values they can take
_HF_ONLY: Mapping[str, tuple[Any, ...]] = {
    "moe_latent_size": (None, 0),
    "n_group": (1, None),
    "norm_topk_prob": (True,),
    "use_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_bias": (False, None),
    "mamba_proj_bias": (False, None),
    "use_conv_bias": (True,),
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu",),
    "sliding_window": (None,),
}
# what each symbol of a pattern needs; a shared expert is optional, so it is not among them
NEEDED_FIELDS: Mapping[str, tuple[str, ...]] = {
    "M": ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups"),
    "*": ("num_attention_heads", "num_query_groups", "kv_channels"),
    "E": ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size"),
    "-": ("ffn_hidden_size",),
}
# fields that belong to one kind of layer: in a model without such layers their values say nothing
LAYER_FIELDS: Mapping[str, tuple[str, ...]] = {
    **NEEDED_FIELDS,
    "E": (
        "num_moe_experts", "moe_router_topk", "moe_router_topk_scaling_factor", "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ParentShape:
    """Sizes of a hybrid model under Megatron's names (0 = the model has no such part).

    ``hybrid_layer_pattern`` holds one symbol a layer: ``M`` Mamba-2, ``*`` attention, ``E`` mixture of
    experts, ``-`` dense MLP. Raises ``UserError`` where the sizes cannot form a model.
    """

    hybrid_layer_pattern: str
    hidden_size: int
    vocab_size: int
    ffn_hidden_size: int = 0
    moe_ffn_hidden_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    num_moe_experts: int = 0
    moe_router_topk: int = 0
    moe_router_topk_scaling_factor: float = 1.0
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    mamba_state_dim: int = 0
    mamba_num_groups: int = 0
    num_attention_heads: int = 0
    num_query_groups: int = 0
    kv_channels: int = 0
    conv_kernel: int = 4
    mamba_chunk_size: int = 128
    max_position_embeddings: int = 4096
    layernorm_epsilon: float = 1e-5
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        pattern = check_pattern(self.hybrid_layer_pattern, "hybrid_layer_pattern")
        check_sizes(vars(self))
        if not pattern or (bad := sorted(set(pattern) - set(SYMBOLS))):
            what = f"unknown layer symbols {''.join(bad)!r}" if pattern else "no layers"
            raise UserError(
                f"hybrid_layer_pattern {pattern!r} has {what}; use M, *, E and - "
                "(multi-token-prediction layers and pipeline bars are not part of the shape)"
            )
        for symbol in sorted(set(pattern)):
            if missing := [f for f in NEEDED_FIELDS[symbol] if getattr(self, f) <= 0]:
                raise UserError(f"a {symbol!r} layer needs {', '.join(missing)} > 0 in the model's sizes")
        for whole, part in (
            ("mamba_num_heads", "mamba_num_groups"),
            ("num_attention_heads", "num_query_groups"),
        ):
            if getattr(self, part) and getattr(self, whole) % getattr(self, part):
                raise UserError(
                    f"{whole}={getattr(self, whole)} is not a multiple of {part}={getattr(self, part)}"
                )
        if self.moe_router_topk > self.num_moe_experts:
            raise UserError(
                f"moe_router_topk={self.moe_router_topk} exceeds num_moe_experts={self.num_moe_experts}"
            )
        if pattern.count("E") * self.num_moe_experts > MOST_EXPERTS:
            raise UserError(
                f"num_moe_experts={self.num_moe_experts} in {pattern.count('E')} layers are more than "
                f"{MOST_EXPERTS} experts; no model has as many"
            )

    @property
    def num_layers(self) -> int:
        return len(self.hybrid_layer_pattern)

    def layers_of(self, symbol: str) -> tuple[int, ...]:
        """Indices of the layers of one type, in model order."""
        return tuple(i for i, s in enumerate(self.hybrid_layer_pattern) if s == symbol)

    def size(self, axis_name: str) -> int:
        """Full size of an elastic axis; 0 where the model has no such part."""
        a = axis(axis_name)
        if a.symbol and a.symbol not in self.hybrid_layer_pattern:
            return 0
        return getattr(self, axis_name)

    def groups(self, axis_name: str) -> int:
        """Structural groups of an axis (SSM groups, KV groups), 1 where it has none."""
        field = axis(axis_name).groups
        return getattr(self, field) if field else 1

    def override(self, **sizes: Any) -> ParentShape:
        """The same model with other sizes."""
        return replace(self, **sizes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ParentShape:
        """Inverse of ``to_dict``. Raises ``UserError`` for unknown or missing fields."""
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(data) - names):
            odd = ", ".join(
                name if name.isidentifier() and len(name) < 60 else shown(name) for name in unknown[:5]
            )
            raise UserError(f"unknown model sizes {odd}; known: {', '.join(sorted(names))}")
        try:
            return cls(**data)
        except TypeError as e:
            raise UserError(f"incomplete model sizes: {e}") from None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ParentShape:
        """Shape of a ``nemotron_h`` ``config.json``.

        Raises ``UserError`` for another model type, or for parts this project refuses rather than drops:
        latent MoE projections, group-limited routing, projection biases, other activations, sliding windows.
        """
        if config.get("model_type") != "nemotron_h":
            raise UserError(
                f"model_type is {shown(config.get('model_type'))}; only 'nemotron_h' models can be read"
            )
        pattern = _hf_pattern(config)
        for field, legal in _HF_ONLY.items():
            if config.get(field, legal[0]) not in legal:
                raise UserError(
                    f"it has {field}={shown(config[field])}, which elastic models do not support yet; "
                    "convert this model without it"
                )
        experts, again = (config.get(name) for name in ("n_routed_experts", "num_local_experts"))
        if again is not None and again != experts:
            raise UserError(
                f"it contradicts itself: n_routed_experts is {shown(experts)}, num_local_experts {shown(again)}; "
                "remove the wrong one"
            )
        named = {name: axis(name).hf for name in _HF_AXES} | _HF_FIELDS
        sizes = dict.fromkeys(_HF_AXES, 0)
        sizes |= {ours: config[hf] for ours, hf in named.items() if config.get(hf) is not None}
        check_sizes(sizes, named)
        shared = config.get("n_shared_experts")
        if "E" in pattern and not whole_number(
            0 if shared is None else shared, "n_shared_experts", 0, 1 << 16
        ):
            sizes["moe_shared_expert_intermediate_size"] = 0
        drop = {"M": ("mamba_", "conv"), "*": ("num_attention", "num_query", "kv_"), "E": ("moe_", "num_moe")}
        for symbol, prefixes in drop.items():
            if symbol not in pattern:
                sizes = {k: v for k, v in sizes.items() if not k.startswith(prefixes)}
        if "-" not in pattern:
            sizes["ffn_hidden_size"] = 0
        if not sizes.get("hidden_size") or not sizes.get("vocab_size"):
            raise UserError("it lacks hidden_size or vocab_size; it is not a complete nemotron_h config")
        return cls(hybrid_layer_pattern=pattern, **sizes)

    def to_hf(self) -> dict[str, Any]:
        """The ``nemotron_h`` fields that state this shape; the caller merges them over the parent's config.

        ``expand`` is written only where the sizes imply a whole number: transformers accepts nothing else there
        and reads the inner width from the head sizes. Layer types are in all three spellings that loaders read.
        """
        out: dict[str, Any] = {axis(n).hf: self.size(n) for n in _HF_AXES if self.size(n)}
        out |= {hf: getattr(self, ours) for ours, hf in _HF_FIELDS.items() if getattr(self, ours) != 0}
        out["tie_word_embeddings"] = self.tie_embeddings
        out["hybrid_override_pattern"] = self.hybrid_layer_pattern
        out["num_hidden_layers"] = self.num_layers
        names = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
        out["layers_block_type"] = [names[s] for s in self.hybrid_layer_pattern]
        if "M" in self.hybrid_layer_pattern:
            expand, rest = divmod(self.mamba_num_heads * self.mamba_head_dim, self.hidden_size)
            out |= {} if rest else {"expand": expand}
        if "E" in self.hybrid_layer_pattern:
            out["n_shared_experts"] = int(self.moe_shared_expert_intermediate_size > 0)
        return out


def _hf_pattern(config: Mapping[str, Any]) -> str:
    """The layers that a ``config.json`` states, in either spelling. Raises ``UserError`` where two disagree."""
    types = listed(config.get("layers_block_type") or (), "layers_block_type")
    if unknown := sorted({str(t)[:40] for t in types if not isinstance(t, str) or t not in _HF_LAYER_TYPES}):
        raise UserError(
            f"layers_block_type has unknown layer types {', '.join(unknown[:5])}; known are "
            f"{', '.join(_HF_LAYER_TYPES)}"
        )
    by_type = check_pattern("".join(_HF_LAYER_TYPES[t] for t in types), "layers_block_type")
    pattern = check_pattern(config.get("hybrid_override_pattern") or by_type, "hybrid_override_pattern")
    if by_type and by_type != pattern:
        raise UserError(
            f"it contradicts itself: hybrid_override_pattern is {shown(pattern)}, layers_block_type says "
            f"{shown(by_type)}; remove the wrong one"
        )
    count = config.get("num_hidden_layers")
    if count is not None and whole_number(count, "num_hidden_layers", 0, MOST_LAYERS) != len(pattern):
        raise UserError(
            f"it contradicts itself: num_hidden_layers is {shown(count)}, and its layers are {len(pattern)} "
            f"({shown(pattern)}); correct the wrong one"
        )
    return pattern
