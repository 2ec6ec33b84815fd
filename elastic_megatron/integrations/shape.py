"""The model that somebody else's config describes, as a ``ParentShape``."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from ..blocks import transformer_config
from ..errors import UserError
from ..space import ParentShape
from ..space.parent import LAYER_FIELDS

# what the numerics of a nemotron_h model fix in a TransformerConfig; the values are those that we build with
_FIXED = (
    "normalization", "layernorm_zero_centered_gamma", "add_bias_linear", "add_qkv_bias", "gated_linear_unit",
    "activation_func", "hidden_dropout", "attention_dropout", "qk_layernorm", "softmax_type", "window_size",
    "attention_output_gate", "multi_latent_attention",
)  # fmt: skip
_FIXED_MOE = (
    "moe_router_score_function", "moe_router_enable_expert_bias", "moe_router_dtype", "moe_router_num_groups",
    "moe_shared_expert_gate", "moe_apply_probs_on_input", "moe_expert_capacity_factor",
)  # fmt: skip
# values that mean what ours means: all experts in one group, as Megatron-Bridge says it
_SAME = (("moe_router_num_groups", 1),)


def parent_shape(config: Any) -> ParentShape:
    """The shape of the ``HybridModel`` that a config builds.

    Args:
        config: Megatron's ``HybridModelConfig`` or Megatron-Bridge's ``HybridModelProvider``.

    Raises ``UserError`` where that is no model of the Nemotron-H family, with the first setting that differs.
    """
    # the bars of a pattern cut it into pipeline stages
    pattern = (config.hybrid_layer_pattern or "").replace("|", "")
    names = [f for symbol in LAYER_FIELDS if symbol in pattern for f in LAYER_FIELDS[symbol]]
    given = {f: getattr(config, f) for f in ("hidden_size", "layernorm_epsilon", *names)}
    shape = ParentShape(
        hybrid_layer_pattern=pattern,
        vocab_size=_rows_of_embedding(config),
        max_position_embeddings=config.seq_length,
        tie_embeddings=config.share_embeddings_and_output_weights,
        **{f: value for f, value in given.items() if value is not None},
    )
    if config.position_embedding_type != "none":
        raise _differs("position_embedding_type", config.position_embedding_type, "none")
    needed = transformer_config(shape, torch.float32)
    for name in (*_FIXED, *(_FIXED_MOE if "E" in pattern else ())):
        value, expected = (_comparable(getattr(c, name, None)) for c in (config, needed))
        if value != expected and (name, value) not in _SAME:
            raise _differs(name, value, expected)
    return shape


def check_same(shape: ParentShape, other: ParentShape, ours: str, theirs: str) -> None:
    """Raise ``UserError`` where two descriptions of one model differ; ``ours`` and ``theirs`` name them."""
    kinds = {f: symbol for symbol, names in LAYER_FIELDS.items() for f in names}
    pattern = shape.hybrid_layer_pattern + other.hybrid_layer_pattern
    for name in (f.name for f in fields(ParentShape)):
        # longest sequences and chunks of the scan change no number
        counts = (
            name not in ("max_position_embeddings", "mamba_chunk_size") and kinds.get(name, "") in pattern
        )
        mine, their = getattr(shape, name), getattr(other, name)
        if counts and mine != their:
            raise UserError(f"{ours}: {name} is {mine!r}, but {theirs} has {their!r}; make them agree")


def _rows_of_embedding(config: Any) -> int:
    """The vocabulary with the padding that Megatron gives it."""
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    if not config.vocab_size:
        raise UserError("the config has no vocab_size, so the model's size is unknown; set it")
    if not config.should_pad_vocab:
        return int(config.vocab_size)
    return calculate_padded_vocab_size(
        config.vocab_size, config.make_vocab_size_divisible_by, config.tensor_model_parallel_size
    )


def _comparable(value: Any) -> Any:
    """Functions compare by name: every package has its own squared ReLU."""
    return getattr(value, "__name__", value)


def _differs(name: str, value: Any, expected: Any) -> UserError:
    return UserError(
        f"{name} is {value!r}, but models of the Nemotron-H family have {expected!r}; set it so "
        "(docs/megatron_lm.md)"
    )
