"""The local layer spec: the keys of Transformer Engine's checkpoints, and the same numbers in every layout."""

from typing import Any

import pytest

from elastic_megatron import runtime
from elastic_megatron.errors import UserError

Outcomes = dict[str, dict[str, Any]]

# What Megatron's stock Transformer Engine spec writes for M*EM-E: input norms fused into the linear that
# follows (layer_norm_weight), the MoE layer's norm by itself, all experts in one tensor.
MAMBA = {f"mixer.in_proj.weight.{part}" for part in ("z", "x", "B", "C", "dt")} | {
    f"mixer.conv1d.{kind}.{part}" for kind in ("weight", "bias") for part in ("x", "B", "C")
} | {
    "mixer." + name
    for name in ("A_log", "D", "dt_bias", "norm.weight", "in_proj.layer_norm_weight", "out_proj.weight")
}  # fmt: skip
ATTENTION = {
    "self_attention." + name
    for name in ("linear_qkv.layer_norm_weight", "linear_qkv.weight", "linear_proj.weight")
}
MLP = {"mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
MOE = {"pre_mlp_layernorm.weight", "mlp.router.weight", "mlp.router.expert_bias"} | {
    f"mlp.{part}.linear_fc{i}.weight" for part in ("experts.experts", "shared_experts") for i in (1, 2)
}
KEYS = {
    f"decoder.layers.{i}.{name}"
    for i, names in enumerate((MAMBA, ATTENTION, MOE, MAMBA, MLP, MOE))
    for name in names
} | {"embedding.word_embeddings.weight", "decoder.final_norm.weight", "output_layer.weight"}


def test_sharded_keys_are_those_of_transformer_engine(outcomes: Outcomes) -> None:
    shapes = outcomes["sharded_keys"]["value"]
    assert set(shapes) == KEYS
    assert shapes["decoder.layers.2.mlp.experts.experts.linear_fc1.weight"] == [4, 24, 32]


def test_experts_exchange_tokens_between_ranks(outcomes: Outcomes) -> None:
    assert outcomes["expert_parallel"].get("value", 0) > 0, outcomes["expert_parallel"]


def test_latent_projections_build(outcomes: Outcomes) -> None:
    assert "error" not in outcomes["latent_projections"], outcomes["latent_projections"]


def test_multi_token_prediction_gives_every_parameter_a_gradient(outcomes: Outcomes) -> None:
    assert outcomes["multi_token_prediction"]["value"] == []


def test_weights_train_alike_replicated_and_under_tensor_sequence_and_expert_parallelism(
    outcomes: Outcomes,
) -> None:
    outcome = outcomes["tensor_parallel_loads_replicated"]
    replicated, parallel = outcome.get("value", (outcome, None))
    assert parallel == pytest.approx(replicated, rel=1e-6)


def test_an_optimizer_state_moves_from_replicated_to_expert_parallel(outcomes: Outcomes) -> None:
    outcome = outcomes["expert_parallel_resumes_replicated"]
    replicated, parallel = outcome.get("value", (outcome, None))
    assert parallel == pytest.approx(replicated, rel=1e-6)


def test_context_parallel_losses_and_gradients_equal_the_whole_sequence(outcomes: Outcomes) -> None:
    assert max(outcomes["context_parallel_equals_whole"]["value"]) < 1e-5


def test_transformer_engine_that_is_not_installed_is_refused() -> None:
    with pytest.raises(UserError, match="needs transformer_engine"):
        runtime.hybrid_stack_spec("te")
    with pytest.raises(UserError, match="choose auto, te or local"):
        runtime.hybrid_stack_spec("apex")  # type: ignore[arg-type]
