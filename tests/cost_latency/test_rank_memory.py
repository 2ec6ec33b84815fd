"""Memory per rank: its parts add up, and follow the layout."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from layout_shapes import DENSE, NANO

from elastic_megatron.cost import account, rank_memory
from elastic_megatron.cost.loss_memory import chunk_of
from elastic_megatron.cost.rank_memory import Load, memory_per_rank, params_per_rank, usable
from elastic_megatron.cost.setting import sizes_of
from elastic_megatron.cost.sizes import parent_fields
from elastic_megatron.recipe.training import Parallel
from elastic_megatron.space import ParentShape, tensors_of


def memory(shape: ParentShape, layout: dict[str, Any] | None = None, **changes: Any) -> dict[str, int]:
    """Of a micro-batch of 2 x 64 tokens with a teacher of the same shape, and Adam's state whole."""
    layout = {"distributed_optimizer": False} | (layout or {})
    load = Load(64, 2, teacher=shape)
    return memory_per_rank(shape, Parallel(**layout), replace(load, **changes))


@pytest.mark.parametrize("shape", [NANO, DENSE])
@pytest.mark.parametrize(
    "layout", [{}, {"pipeline": 2}, {"pipeline": 4}, {"pipeline": 5}, {"pipeline": 3, "virtual_pipeline": 2}]
)
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
    frozen = memory(DENSE, training=False, teacher=None)
    assert frozen["gradients"] == frozen["optimizer"] == frozen["teacher"] == 0
    assert frozen["total"] == 2 * n + frozen["activations"] + frozen["logits"]


def test_distributed_optimizer_splits_adam_over_replicas() -> None:
    layout: dict[str, Any] = {"expert": 4, "world_size": 16}
    dense, routed = params_per_rank(NANO, Parallel(**layout), 0)
    plain, split = memory(NANO, layout), memory(NANO, layout | {"distributed_optimizer": True})
    assert plain["optimizer"] == 12 * (dense + routed)
    assert split["optimizer"] == pytest.approx(12 * (dense / 16 + routed / 4), abs=1)
    assert {k: v for k, v in plain.items() if k not in ("optimizer", "total")} == {
        k: v for k, v in split.items() if k not in ("optimizer", "total")
    }


def test_activations_by_hand() -> None:
    """One layer of each kind: 128 tokens and 2 bytes a number, plus the embedding."""
    one = replace(DENSE, hybrid_layer_pattern="*", vocab_size=1000)
    attention = 2 * 256 + 2 * (12 + 4) * 16
    assert memory(one)["activations"] == 128 * 2 * (attention + 256)
    mamba = 2 * 256 + (2 * 256 + 2 * 64 + 16) + (256 + 2 * 64) + 2 * 256
    assert memory(replace(one, hybrid_layer_pattern="M"))["activations"] == 128 * 2 * (mamba + 256)
    ffn = replace(one, hybrid_layer_pattern="-")
    assert memory(ffn)["activations"] == 128 * 2 * (2 * 256 + 2 * 1000 + 256)
    recomputed = 128 * 2 * ((2 * 256 + 2 * 1000) + 256 + 256)
    assert memory(ffn, {"recompute": "full"})["activations"] == recomputed


def test_the_loss_by_hand_and_of_the_last_stage_alone() -> None:
    """128 tokens of 256 channels, all of them a chunk, and a vocabulary of 1000."""
    one, weight = replace(DENSE, vocab_size=1000), 1000 * 256
    states, part = 128 * 256 * 3, weight * 2 / 16
    assert memory(one)["logits"] == 128 * 1000 * (3 * 4 + 2) + weight * 4 + part + states * 2
    assert memory(one, dtype="fp32")["logits"] == 128 * 1000 * 3 * 4 + weight * 4 + states * 4
    alone = 128 * 1000 * (4 + 2) + weight * 4 + part + 128 * 256 * 2 * 2
    assert memory(one, teacher=None)["logits"] == alone
    assert memory(one, chunk=1)["logits"] == weight * (4 + 2) + states * 2
    wide = replace(one, hidden_size=512)
    assert memory(one, teacher=wide)["logits"] == memory(one)["logits"] + 128 * 256 * 2
    assert memory(one, training=False, teacher=None, logits=3)["logits"] == 3 * 128 * 1000 * 2
    assert memory(one, {"context": 2})["logits"] == 64 * 1000 * 14 + weight * 4 + part + states * 2 / 2
    assert memory(one, {"tensor": 2})["logits"] == (128 * 1000 * 14 + weight * 4 + part) / 2 + states * 2
    ends = [rank_memory._stage(one, sizes_of(Parallel(pipeline=3)), s, Load(64, 2)) for s in range(3)]
    assert [stage["logits"] > 0 for stage in ends] == [False, False, True]


def test_of_more_tokens_than_a_chunk_only_hidden_states_are_more() -> None:
    one = replace(DENSE, vocab_size=1000)
    for chunk, rows in ((None, 128), (100, 100), (1000, 256)):
        once, twice = (memory(one, seq_length=n, chunk=chunk)["logits"] for n in (128, 256))
        assert once == rows * 1000 * 14 + 1000 * 256 * (4 + 2 / 16) + 256 * 256 * 3 * 2
        assert twice - once == 256 * 256 * 3 * 2 + (256 * 1000 * 14 if chunk == 1000 else 0)


def test_a_chunk_is_half_the_channels_and_not_too_few_tokens() -> None:
    assert [chunk_of(h) for h in (16, 128, 256, 2688)] == [64, 64, 128, 1344]


def test_rounded_copies_by_hand() -> None:
    """Two dense layers of 2 x 1000 x 256 numbers, and work on 1000 x 256 of them in fp32."""
    two = replace(DENSE, hybrid_layer_pattern="--", vocab_size=1000)
    names = ("mlp.linear_fc1.weight", "mlp.linear_fc2.weight")
    both = frozenset((layer, name) for layer in range(2) for name in names)
    one, work = 2 * 1000 * 256, 4 * 1000 * 256
    assert memory(two)["rounded"] == 0
    assert memory(two, rounded=both)["rounded"] == 2 * 2 * one + work
    assert memory(two, rounded=both, dtype="fp32")["rounded"] == 2 * 4 * one + work
    assert memory(two, {"tensor": 2}, rounded=both)["rounded"] == (2 * 2 * one + work) / 2
    assert memory(two, {"recompute": "full"}, rounded=both)["rounded"] == 2 * one + work
    assert memory(two, rounded=both, training=False, teacher=None)["rounded"] == 2 * one / 2 + work
    assert memory(two, rounded=frozenset({(1, names[0])}))["rounded"] == 2 * one / 2 + work
    split = [
        rank_memory._rounded(two, sizes_of(Parallel(pipeline=2)), s, Load(64, 2, rounded=both))
        for s in (0, 1)
    ]
    assert split == [2 * 2 * one + work, 2 * one + work], "the first stage has two micro-batches in flight"


def test_rounded_experts_are_those_of_a_rank() -> None:
    names = {t.name for t in tensors_of("E", parent_fields(NANO)) if t.per_expert}
    layer = NANO.hybrid_layer_pattern.index("E")
    rounded = frozenset((layer, name) for name in names)
    expert = NANO.moe_ffn_hidden_size * NANO.hidden_size
    found = memory(NANO, {"expert": 8, "expert_tensor": 2}, rounded=rounded)["rounded"]
    assert found == 2 * 2 * 128 / 8 * expert / 2 + 4 * expert / 2


def test_a_teacher_of_another_shape_weighs_what_it_is() -> None:
    large = replace(DENSE, hidden_size=512, hybrid_layer_pattern="M-M*M-" * 2)
    assert memory(DENSE, teacher=large)["teacher"] == 2 * account(large).total_params
    split = memory(DENSE, {"pipeline": 2}, teacher=large)
    both = [2 * sum(params_per_rank(large, Parallel(pipeline=2), stage)) for stage in range(2)]
    assert split["teacher"] in both


@pytest.mark.parametrize(
    "layout",
    [{"tensor": 2}, {"tensor": 2, "sequence": True}, {"expert": 8}, {"expert_tensor": 2}, {"context": 2},
     {"pipeline": 2}],
)  # fmt: skip
def test_every_split_saves_memory(layout: dict[str, Any]) -> None:
    assert memory(NANO, layout, seq_length=8192)["total"] < memory(NANO, seq_length=8192)["total"]


def test_recomputation_saves_activations_only() -> None:
    kept, recomputed = memory(NANO), memory(NANO, {"recompute": "full"})
    assert recomputed["activations"] < kept["activations"] / 2
    assert recomputed["weights"] == kept["weights"]


def test_sequence_parallelism_splits_activations_only() -> None:
    tensor, sequence = memory(NANO, {"tensor": 2}), memory(NANO, {"tensor": 2, "sequence": True})
    assert sequence["activations"] < tensor["activations"] and sequence["weights"] == tensor["weights"]


def schedule_in_flight(stages: int, chunks: int | None, stage: int, micro_batches: int) -> float:
    """Most micro-batches kept at once, by walking 1F1B: warm-up forwards, then a forward before each backward.

    The warm-ups are those of Megatron's ``get_pp_rank_microbatches``.
    """
    total = micro_batches * (chunks or 1)
    warmup = stages - stage - 1 if chunks is None else 2 * (stages - stage - 1) + (chunks - 1) * stages
    held = peak = min(warmup, total)
    for _ in range(total - held):
        held += 1
        peak = max(peak, held)
        held -= 1
    return peak / (chunks or 1)


@pytest.mark.parametrize("chunks", [None, 2, 5])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_activations_in_flight_are_those_of_the_schedule(stages: int, chunks: int | None) -> None:
    """Equal chunks and no ends to speak of: a stage's activations are what it keeps, times one micro-batch's."""
    layers = stages * (chunks or 1)
    shape = replace(DENSE, hybrid_layer_pattern="M" * layers, vocab_size=2)
    alone = replace(shape, hybrid_layer_pattern="M" * (chunks or 1))
    one, embedded = memory(alone, teacher=None)["activations"], 2 * 256 * 128
    parallel = Parallel(pipeline=stages, virtual_pipeline=chunks)
    for stage in range(stages):
        expected = schedule_in_flight(stages, chunks, stage, 100 * stages)
        kept = one - embedded * (stage > 0)
        found = rank_memory._activations(shape, sizes_of(parallel), stage, Load(64, 2))
        assert found == pytest.approx(expected * kept)


def test_a_stage_keeps_the_teachers_hidden_states_with_the_message_that_brought_them() -> None:
    shape, entry = replace(DENSE, hybrid_layer_pattern="MMMMM"), 2 * 256 * 128
    for layout, in_flight, chunks in (
        ({"pipeline": 2}, 1, 1),
        ({"pipeline": 2, "virtual_pipeline": 2}, (2 + 1) / 2, 2),
    ):
        for stage, received in ((0, chunks - 1), (1, chunks)):
            parallel = sizes_of(Parallel(**layout, recompute="full"))
            alone, both = (
                rank_memory._activations(shape, parallel, stage, Load(64, 2, teacher=teacher))
                for teacher in (None, shape)
            )
            warm = in_flight + (1 if stage == 0 else 0)
            assert both - alone == pytest.approx(warm * received * entry)


def test_the_fullest_stage_is_priced() -> None:
    """Six layers on four stages are 1, 2, 2, 1; a large vocabulary makes the ends heavier all the same."""
    small, large = replace(DENSE, vocab_size=64), replace(DENSE, vocab_size=2**17)
    for shape, stage in ((small, 1), (large, 3)):
        parallel = Parallel(pipeline=4)
        weights = [2 * sum(params_per_rank(shape, parallel, s)) for s in range(4)]
        assert memory(shape, {"pipeline": 4})["weights"] == weights[stage]
        assert memory(shape, {"pipeline": 4}, training=False)["teacher"] == weights[stage]
    assert sum(params_per_rank(small, parallel, 1)) > sum(params_per_rank(small, parallel, 0))


def test_a_tied_embedding_is_copied_to_the_last_stage() -> None:
    """Megatron's output layer of the last stage shares the word embeddings by a copy kept equal."""
    tied, free = replace(DENSE, tie_embeddings=True), DENSE
    for stages in (2, 3):
        parallel = Parallel(pipeline=stages)
        for stage in range(stages):
            assert params_per_rank(tied, parallel, stage) == params_per_rank(free, parallel, stage)


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        ({"tensor": 2, "sequence": True, "expert": 8, "expert_tensor": 1, "context": 2}, 8),
        ({"tensor": 2, "sequence": True, "expert": 4, "expert_tensor": 1, "context": 3, "pipeline": 2}, 24),
    ],
)
def test_without_a_world_size_the_smallest_job_is_priced(layout: dict[str, Any], world: int) -> None:
    whole = layout | {"distributed_optimizer": True}
    assert memory(NANO, whole) == memory(NANO, whole | {"world_size": world})


@given(
    st.sampled_from([NANO, DENSE]), st.sampled_from(["fp32", "bf16"]), st.booleans(), st.integers(1, 6),
    st.integers(1, 4096),
)  # fmt: skip
def test_more_tokens_take_more_memory_and_sharding_never_does(
    shape: ParentShape, dtype: str, elastic: bool, micro: int, length: int
) -> None:
    def total(layout: dict[str, Any], sequences: int = micro, tokens: int = length) -> int:
        load = Load(tokens, sequences, dtype, teacher=shape, elastic=elastic)
        return memory_per_rank(shape, Parallel(**layout), load)["total"]

    plain = total({})
    assert total({}, micro + 1) > plain and total({}, micro, length + 1) > plain
    splits = [{"context": 2}, {"tensor": 2, "sequence": True}, {"recompute": "full"}, {"world_size": 8}]
    splits += [{"expert": 4}] if "E" in shape.hybrid_layer_pattern else []
    assert all(total(layout) < plain for layout in splits)


def test_a_card_is_not_filled_to_the_brim() -> None:
    assert usable(80) == 80 * 2**30 * 0.9 - 2 * 2**30
