"""Memory per rank: its parts add up, and follow the layout."""

from dataclasses import replace
from typing import Any

import pytest
from layout_shapes import DENSE, NANO

from elastic_megatron.cost import account
from elastic_megatron.cost.layout import memory_per_rank
from elastic_megatron.cost.rank_memory import params_per_rank
from elastic_megatron.recipe.training import Parallel
from elastic_megatron.space import ParentShape

RUN: dict[str, Any] = {
    "dtype": "bf16",
    "training": True,
    "seq_length": 64,
    "micro_batch_size": 2,
    "teacher": True,
}


def memory(shape: ParentShape, layout: dict[str, Any] | None = None, **changes: Any) -> dict[str, int]:
    return memory_per_rank(shape, Parallel(**layout or {}), **RUN | changes)


@pytest.mark.parametrize("shape", [NANO, DENSE])
@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}, {"pipeline": 3, "virtual_pipeline": 2}])
def test_stages_together_hold_every_parameter_once(shape: ParentShape, layout: dict[str, Any]) -> None:
    parallel = Parallel(**layout)
    held = sum(sum(params_per_rank(shape, parallel, stage)) for stage in range(parallel.pipeline))
    assert held == account(shape).total_params
    tied = replace(shape, tie_embeddings=True)
    again = sum(sum(params_per_rank(tied, parallel, stage)) for stage in range(parallel.pipeline))
    copies = shape.vocab_size * shape.hidden_size if parallel.pipeline > 1 else 0
    assert again == account(tied).total_params + copies


def test_ranks_share_all_but_norms_and_routers() -> None:
    whole = params_per_rank(NANO, Parallel(), 0)
    shared = params_per_rank(NANO, Parallel(tensor=4, sequence=True, expert=8, expert_tensor=2), 0)
    hidden, layers = NANO.hidden_size, NANO.num_layers
    replicated = hidden * (layers + 1) + 23 * NANO.num_moe_experts * (hidden + 1)
    assert shared[0] == (whole[0] - replicated) / 4 + replicated
    assert shared[1] == whole[1] / 16


def test_parts_are_bytes_per_parameter_and_add_up() -> None:
    n = account(DENSE).total_params
    for dtype, weight, adam in (("bf16", 2, 12), ("fp32", 4, 8)):
        m = memory(DENSE, dtype=dtype)
        assert (m["weights"], m["gradients"], m["optimizer"], m["teacher"]) == (
            weight * n,
            4 * n,
            adam * n,
            weight * n,
        )
        assert m["total"] == sum(v for k, v in m.items() if k != "total")
    frozen = memory(DENSE, training=False, teacher=False)
    assert frozen["gradients"] == frozen["optimizer"] == frozen["teacher"] == 0
    assert frozen["total"] == 2 * n + frozen["activations"]


def test_distributed_optimizer_splits_adam_over_replicas() -> None:
    layout: dict[str, Any] = {"expert": 4, "world_size": 16}
    dense, routed = params_per_rank(NANO, Parallel(**layout), 0)
    plain, split = memory(NANO, layout), memory(NANO, layout, distributed_optimizer=True)
    assert plain["optimizer"] == 12 * (dense + routed)
    assert split["optimizer"] == pytest.approx(12 * (dense / 16 + routed / 4), abs=1)
    assert {k: v for k, v in plain.items() if k not in ("optimizer", "total")} == {
        k: v for k, v in split.items() if k not in ("optimizer", "total")
    }


def test_activations_by_hand() -> None:
    """One layer of each kind: 128 tokens and 2 bytes a number, plus embedding and logits."""
    one = replace(DENSE, hybrid_layer_pattern="*", vocab_size=1000)
    logits = 128 * 1000 * (2 + 4)
    attention = 2 * 256 + 2 * (12 + 4) * 16
    expected = 128 * 2 * (attention + 256) + 2 * logits
    assert memory(one)["activations"] == expected
    assert memory(one, teacher=False)["activations"] == expected - logits
    mamba = 2 * 256 + (2 * 256 + 2 * 64 + 16) + (256 + 2 * 64) + 2 * 256
    assert (
        memory(replace(one, hybrid_layer_pattern="M"))["activations"] == 128 * 2 * (mamba + 256) + 2 * logits
    )
    ffn = replace(one, hybrid_layer_pattern="-")
    assert memory(ffn)["activations"] == 128 * 2 * (2 * 256 + 2 * 1000 + 256) + 2 * logits
    recomputed = 128 * 2 * ((2 * 256 + 2 * 1000) + 256 + 256) + 2 * logits
    assert memory(ffn, recompute=True)["activations"] == recomputed


@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"expert": 8}, {"expert_tensor": 2}, {"context": 2},
     {"pipeline": 2}],
)  # fmt: skip
def test_every_split_saves_memory(layout: dict[str, Any]) -> None:
    assert memory(NANO, layout, seq_length=8192)["total"] < memory(NANO, seq_length=8192)["total"]


def test_recomputation_saves_activations_only() -> None:
    kept, recomputed = memory(NANO), memory(NANO, recompute=True)
    assert recomputed["activations"] < kept["activations"] / 2
    assert recomputed["weights"] == kept["weights"]


def test_sequence_parallelism_splits_activations_only() -> None:
    tensor, sequence = memory(NANO, {"tensor": 2}), memory(NANO, {"tensor": 2, "sequence": True})
    assert sequence["activations"] < tensor["activations"] and sequence["weights"] == tensor["weights"]


def test_interleaved_pipelines_keep_more_activations() -> None:
    """1 + (p - 1) / (p v) times as many on the first stage (arXiv 2104.04473, 2205.05198), here 4/3."""
    shape = replace(DENSE, hybrid_layer_pattern="MMMMMM", vocab_size=2)
    plain = memory(shape, {"pipeline": 3}, teacher=False)["activations"]
    chunks = memory(shape, {"pipeline": 3, "virtual_pipeline": 2}, teacher=False)["activations"]
    assert chunks == pytest.approx(plain * 4 / 3)
