"""The `model` section: a Hugging Face directory, a checkpoint, or sizes for a random start."""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from elastic_megatron.recipe.types import (
    Count,
    FilePath,
    Positive,
    PositiveFloat,
    Problem,
    Section,
    Switch,
    raise_any,
)
from elastic_megatron.space.parent import NEEDED_FIELDS


class Sizes(Section):
    """Dimensions of a hybrid model, by their Megatron `TransformerConfig` names."""

    hybrid_layer_pattern: str = Field(
        min_length=1,
        description="One symbol per layer: M (Mamba-2), * (attention), E (mixture of experts), - (dense FFN).",
    )
    hidden_size: Positive = Field(description="Width of the residual stream.")
    vocab_size: Positive = Field(description="Entries of the embedding and of the output layer.")
    ffn_hidden_size: Count = Field(default=0, description="Width of the dense FFN (-).")
    moe_ffn_hidden_size: Count = Field(default=0, description="Width of one routed expert (E).")
    moe_shared_expert_intermediate_size: Count = Field(
        default=0, description="Width of the shared expert (E); 0 for none."
    )
    num_moe_experts: Count = Field(default=0, description="Routed experts per layer (E).")
    moe_router_topk: Count = Field(default=0, description="Routed experts that each token visits (E).")
    moe_router_topk_scaling_factor: PositiveFloat = Field(
        default=1.0, description="Factor on the renormalised expert weights (E)."
    )
    mamba_num_heads: Count = Field(default=0, description="Mamba heads (M).")
    mamba_head_dim: Count = Field(default=0, description="Channels per Mamba head (M).")
    mamba_state_dim: Count = Field(default=0, description="Entries of the SSM state per channel (M).")
    mamba_num_groups: Count = Field(default=0, description="Groups of Mamba heads that share B and C (M).")
    num_attention_heads: Count = Field(default=0, description="Query heads (*).")
    num_query_groups: Count = Field(default=0, description="Key-value heads (*).")
    kv_channels: Count = Field(default=0, description="Channels per attention head (*).")
    max_position_embeddings: Positive = Field(
        default=4096, description="Longest sequence, written to exports."
    )
    layernorm_epsilon: PositiveFloat = Field(default=1e-5, description="Epsilon of every RMSNorm.")
    tie_embeddings: Switch = Field(default=False, description="Share the embedding with the output layer.")
    conv_kernel: Positive = Field(default=4, description="Width of Mamba's causal convolution (M).")
    mamba_chunk_size: Positive = Field(default=128, description="Tokens per chunk of the SSD scan (M).")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        raise_any([*self._pattern(), *self._missing(), *self._divisible()])
        return self

    def _pattern(self) -> Iterator[Problem]:
        for position, symbol in enumerate(self.hybrid_layer_pattern):
            if symbol not in NEEDED_FIELDS:
                text = f"symbol {symbol!r} at position {position} is not a layer type; use M, *, E or -"
                yield Problem(("hybrid_layer_pattern",), text)
                return

    def _missing(self) -> Iterator[Problem]:
        for symbol, names in NEEDED_FIELDS.items():
            zero = [name for name in names if not getattr(self, name)]
            if symbol in self.hybrid_layer_pattern and zero:
                text = f"{symbol} layers need {', '.join(zero)} above 0"
                yield Problem(("hybrid_layer_pattern",), text)

    def _divisible(self) -> Iterator[Problem]:
        for heads, groups in (
            ("mamba_num_heads", "mamba_num_groups"),
            ("num_attention_heads", "num_query_groups"),
        ):
            whole, parts = getattr(self, heads), getattr(self, groups)
            if parts and whole % parts:
                yield Problem((heads,), f"{whole} is not a multiple of {groups} = {parts}")
        if self.moe_router_topk > self.num_moe_experts:
            text = f"{self.moe_router_topk} is more than num_moe_experts = {self.num_moe_experts}"
            yield Problem(("moe_router_topk",), text)


class Model(Section):
    """Where the parent comes from: exactly one of `hf`, `checkpoint`, `sizes`."""

    hf: FilePath | None = Field(
        default=None, description="Directory of a Hugging Face nemotron_h model, or its config.json."
    )
    checkpoint: FilePath | None = Field(
        default=None, description="Directory of Megatron checkpoints that elastic-megatron wrote."
    )
    sizes: Sizes | None = Field(
        default=None, description="Dimensions of a model that starts from random weights."
    )
    dtype: Literal["fp32", "bf16"] = Field(
        default="bf16", description="Number format of weights and activations."
    )
    tokenizer: FilePath | None = Field(
        default=None, description="Directory of the tokenizer; default: that of `hf`."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("hf", "checkpoint", "sizes") if getattr(self, name) is not None]
        if not given:
            raise ValueError("needs one of hf, checkpoint or sizes")
        if len(given) > 1:
            remedy = "keep one; null removes an inherited key"
            raise ValueError(f"{' and '.join(given)} are given, but they exclude each other: {remedy}")
        return self
