"""Somebody else's config is either a model that we know exactly, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny_models import SIZES, transformer_fields

from elastic_megatron.errors import UserError
from elastic_megatron.integrations.shape import check_same, parent_shape
from elastic_megatron.space import ParentShape


def config(model: dict[str, Any] | None = None, **transformer: Any) -> Any:
    """Megatron-LM's config of the tiny model."""
    from megatron.core.transformer import TransformerConfig
    from megatron.training.models import HybridModelConfig

    fields = {
        "hybrid_layer_pattern": SIZES["hybrid_layer_pattern"],
        "vocab_size": SIZES["vocab_size"],
        "seq_length": SIZES["max_position_embeddings"],
    }
    return HybridModelConfig(
        transformer=TransformerConfig(**transformer_fields(**transformer)), **(fields | (model or {}))
    )


def test_a_megatron_config_names_the_shape_that_it_builds() -> None:
    assert parent_shape(config()) == ParentShape.from_dict(SIZES)


def test_pipeline_bars_belong_to_the_layout_and_not_to_the_model() -> None:
    assert parent_shape(config({"hybrid_layer_pattern": "M|E*|-"})) == ParentShape.from_dict(SIZES)


def test_the_vocabulary_is_the_one_with_its_padding() -> None:
    padded = config(
        {"should_pad_vocab": True, "make_vocab_size_divisible_by": 50}, tensor_model_parallel_size=2
    )
    assert parent_shape(padded).vocab_size == 300


def test_sizes_of_layers_that_the_model_lacks_say_nothing() -> None:
    with_heads = parent_shape(config({"hybrid_layer_pattern": "M"}, num_layers=1))
    assert with_heads == ParentShape(
        **{f: SIZES[f] for f in SIZES if f.startswith(("mamba", "hidden", "vocab", "max"))},
        hybrid_layer_pattern="M",
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("normalization", "LayerNorm"),
        ("add_bias_linear", True),
        ("gated_linear_unit", True),
        ("hidden_dropout", 0.1),
        ("attention_dropout", 0.1),
        ("layernorm_zero_centered_gamma", True),
        ("qk_layernorm", True),
        ("moe_router_score_function", "softmax"),
        ("moe_router_dtype", "fp64"),
        ("moe_shared_expert_gate", True),
    ],
)
def test_other_numerics_are_refused_by_name(field: str, value: Any) -> None:
    changes = {field: value}
    if field == "moe_router_score_function":  # a bias is for sigmoid scores, and Megatron says so first
        changes["moe_router_enable_expert_bias"] = False
    with pytest.raises(UserError, match=f"{field} is {value!r}, but models of the Nemotron-H family have"):
        parent_shape(config(**changes))


def test_another_activation_is_refused_and_another_squared_relu_is_not() -> None:
    import torch

    def squared_relu(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) ** 2

    assert parent_shape(config(activation_func=squared_relu)) == ParentShape.from_dict(SIZES)
    with pytest.raises(UserError, match="activation_func is 'silu'"):
        parent_shape(config(activation_func=torch.nn.functional.silu))


def test_rotary_positions_are_refused() -> None:
    with pytest.raises(UserError, match="position_embedding_type is 'rope'"):
        parent_shape(config({"position_embedding_type": "rope"}))


def test_two_descriptions_of_one_model_must_agree_on_every_number_that_counts() -> None:
    one = ParentShape.from_dict(SIZES)
    check_same(one, replace(one, max_position_embeddings=7, mamba_chunk_size=64), "one", "other")
    with pytest.raises(UserError, match="one: moe_ffn_hidden_size is 10, but other has 11"):
        check_same(one, replace(one, moe_ffn_hidden_size=11), "one", "other")
