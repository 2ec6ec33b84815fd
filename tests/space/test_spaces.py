"""Spaces, submodels and shapes as values: what is legal, what is nested, and that they survive JSON."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import HETEROGENEOUS, SHAPE, spec_of, subspace

from elastic_megatron.errors import UserError
from elastic_megatron.space import Budget, ElasticSpace, ParentShape, SubmodelSpec

SPACE = subspace()

ILLEGAL: list[Any] = [
    ({"choices": {"moe_ffn_hiden_size": [8]}}, ["moe_ffn_hiden_size", "known axes"]),
    ({"choices": {"num_attention_heads": [5]}}, ["num_attention_heads", "5", "nearest legal: 4, 6"]),
    ({"choices": {"mamba_num_heads": [3]}}, ["mamba_num_heads", "3", "nearest legal: 2, 4"]),
    ({"choices": {"num_moe_experts": [1]}}, ["num_moe_experts", "1", "2..8", "nearest legal: 2"]),
    ({"choices": {"num_moe_experts": [9]}}, ["num_moe_experts", "9", "nearest legal: 8"]),
    ({"choices": {"num_moe_experts": [7]}, "lanes": {"num_moe_experts": 4}}, ["7", "nearest legal: 4, 8"]),
    ({"choices": {"num_moe_experts": [2]}, "lanes": {"num_moe_experts": 4}}, ["2", "nearest legal: 4"]),
    (
        {"choices": {"hidden_size": [20]}, "granule": {"hidden_size": 7}},
        ["hidden_size", "20", "nearest legal: 14, 21"],
    ),
    ({"choices": {"hidden_size": [0]}}, ["hidden_size", "0", "nearest legal: 1"]),
    ({"choices": {"hidden_size": [16]}, "granule": {"hidden_size": 8}}, ["hidden_size=35", "multiple of 8"]),
    ({"choices": {"hidden_size": [16]}, "lanes": {"hidden_size": 5}}, ["lanes.hidden_size", "remove"]),
    ({"choices": {"mamba_num_heads": [2]}, "lanes": {"mamba_num_heads": 6}}, ["SSM group (2)"]),
    (
        {"choices": {"num_moe_experts": [4]}, "lanes": {"num_moe_experts": 3}},
        ["must be a multiple of 1 and divide 8"],
    ),
    ({"choices": {"num_attention_heads": [2]}, "lanes": {"num_attention_heads": 3}}, ["multiple of 2"]),
    ({"choices": {"hidden_size": [16]}, "per_layer": ["hidden_size"]}, ["per_layer", "hidden_size"]),
    (
        {"choices": {"hidden_size": [16]}, "per_layer": ["num_moe_experts"]},
        ["num_moe_experts", "no space.choices"],
    ),
    (
        {"choices": {"hidden_size": [16]}, "lanes": {"num_moe_experts": 2}},
        ["num_moe_experts", "no space.choices"],
    ),
]


@pytest.mark.parametrize(("arguments", "says"), ILLEGAL)
def test_illegal_spaces_are_user_errors_that_name_the_remedy(
    arguments: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        ElasticSpace.build(SHAPE, **arguments)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in says), message


def test_an_axis_without_layers_is_refused() -> None:
    with pytest.raises(UserError, match="no such layer"):
        ElasticSpace.build(SHAPE.override(hybrid_layer_pattern="M*"), {"num_moe_experts": [4]})


@given(st.sampled_from(SPACE.axes), st.integers(-3, 60), st.sampled_from([1, 2, 3]))
def test_every_width_is_either_taken_or_answered_with_legal_ones(axis: str, width: int, granule: int) -> None:
    def build(w: int) -> ElasticSpace:
        return ElasticSpace.build(SHAPE, {axis: [w]}, granule={axis: granule})

    try:
        assert width in build(width).choices_of(axis)
    except UserError as e:
        if "nearest legal: " not in str(e):
            assert "of the parent is no multiple" in str(e)
            return
        offered = [int(w) for w in str(e).split("nearest legal: ")[1].split(", ")]
        assert offered and width not in offered
        for w in offered:
            build(w)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_size": 20}, "hidden_size=20 is no choice"),
        ({"num_moe_experts": [4]}, "num_moe_experts needs 2 widths, got 1"),
        ({"hidden_size": [35, 35]}, "hidden_size needs 1 widths"),
        ({"mamba_num_heads": [6, 6, 3]}, "mamba_num_heads=3 is no choice"),
    ],
)
def test_submodels_outside_the_space_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        SPACE.check(SubmodelSpec.of({**SPACE.full().to_dict(), **change}), "tiny")
    assert says in str(caught.value) and str(caught.value).startswith("tiny")


def test_submodels_must_name_every_axis() -> None:
    with pytest.raises(UserError, match="names axes"):
        SPACE.check(SubmodelSpec.of({"hidden_size": 35}))


def test_heterogeneous_submodels_have_no_single_shape() -> None:
    with pytest.raises(UserError, match="differs between layers"):
        SPACE.shape_of(spec_of(SPACE, **HETEROGENEOUS))
    even = spec_of(SPACE, mamba_num_heads=[4, 4, 4])
    assert SPACE.shape_of(even).mamba_num_heads == 4


def test_choices_are_descending_from_the_parents_size() -> None:
    for a in SPACE.axes:
        choices = SPACE.choices_of(a)
        assert choices[0] == SHAPE.size(a) and list(choices) == sorted(set(choices), reverse=True)
    assert SPACE.full() == SubmodelSpec.of({a: SPACE.choices_of(a)[0] for a in SPACE.axes})


@given(st.integers(0, 10**9))
def test_spaces_and_submodels_survive_json(seed: int) -> None:
    rng = random.Random(seed)
    axes = rng.sample(SPACE.axes, rng.randint(1, len(SPACE.axes)))
    space = ElasticSpace.build(
        SHAPE,
        {a: rng.sample(SPACE.choices_of(a), rng.randint(1, len(SPACE.choices_of(a)))) for a in axes},
        per_layer=[a for a in axes if a not in ("hidden_size", "num_layers") and rng.random() < 0.5],
        layer_order=rng.sample(range(7), 7),
    )
    again = ElasticSpace.from_dict(json.loads(json.dumps(space.to_dict())))
    assert again == space and hash(again) == hash(space) and again.axes == space.axes
    for spec in (space.full(), space.smallest()):
        assert SubmodelSpec.of(json.loads(json.dumps(spec.to_dict()))) == spec


@given(st.lists(st.tuples(*[st.sampled_from([1, 2, 3])] * 3), min_size=3, max_size=3), st.booleans())
def test_nesting_is_a_partial_order(widths: list[tuple[int, int, int]], even: bool) -> None:
    a, b, c = (SubmodelSpec.of({"mamba_num_heads": w[0] if even else w, "hidden_size": w[1]}) for w in widths)
    assert a <= a
    assert not (a <= b and b <= c) or a <= c
    assert not (a <= b and b <= a) or a == b
    truth = widths[0][1] <= widths[1][1] and all(
        x <= y for x, y in zip(*([w[:1] for w in widths[:2]] if even else widths[:2]), strict=True)
    )
    assert (a <= b) == truth


def test_nesting_compares_one_width_with_one_a_layer() -> None:
    one, many = SubmodelSpec.of({"mamba_num_heads": 4}), SubmodelSpec.of({"mamba_num_heads": [4, 6, 4]})
    assert one <= many and not many <= one
    assert not one <= SubmodelSpec.of({"hidden_size": 4})


def test_submodels_do_not_depend_on_the_order_of_their_axes() -> None:
    a, b = SubmodelSpec.of({"x": 1, "y": [2, 3]}), SubmodelSpec.of({"y": (2, 3), "x": 1})
    assert a == b and hash(a) == hash(b) and "x" in a and "z" not in a and a.heterogeneous == ("y",)


def test_shapes_and_budgets_survive_json() -> None:
    assert ParentShape.from_dict(json.loads(json.dumps(SHAPE.to_dict()))) == SHAPE
    budget = Budget("small", "memory_bytes", 0.5, format="nvfp4", batch_size=3)
    assert Budget.from_dict(json.loads(json.dumps(budget.to_dict()))) == budget
    assert Budget("a", "active_params", 1.0).full and not Budget("a", "active_params", 1.0, "absolute").full


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hybrid_layer_pattern": ""}, "no layers"),
        ({"hybrid_layer_pattern": "MX|"}, "'X|'"),
        ({"mamba_state_dim": 0}, "mamba_state_dim"),
        ({"num_attention_heads": 5}, "num_attention_heads=5 is not a multiple of num_query_groups=2"),
        ({"mamba_num_heads": 5}, "mamba_num_heads=5 is not a multiple of mamba_num_groups=2"),
        ({"moe_router_topk": 9}, "exceeds num_moe_experts=8"),
    ],
)
def test_sizes_that_form_no_model_are_user_errors(change: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as caught:
        SHAPE.override(**change)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [{"hidden_size": 3}, {**SHAPE.to_dict(), "hiden_size": 3}])
def test_incomplete_or_unknown_sizes_are_user_errors(data: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        ParentShape.from_dict(data)


@pytest.mark.parametrize("pattern", ["MEM*E-M", "M*", "E", "-"])
@pytest.mark.parametrize("tied", [False, True])
def test_shapes_survive_a_hugging_face_config(pattern: str, tied: bool) -> None:
    config = {
        "model_type": "nemotron_h",
        **SHAPE.override(hybrid_layer_pattern=pattern, tie_embeddings=tied).to_hf(),
    }
    read = ParentShape.from_hf(json.loads(json.dumps(config)))
    assert read.hybrid_layer_pattern == pattern and read.tie_embeddings == tied
    again = ParentShape.from_hf({"model_type": "nemotron_h", **read.to_hf()})
    assert again == read
    if pattern == SHAPE.hybrid_layer_pattern:
        assert read == SHAPE.override(tie_embeddings=tied)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "nemotron_h"),
        ({"moe_latent_size": 64}, "moe_latent_size"),
        ({"n_group": 2}, "n_group"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
        ({"use_bias": True}, "use_bias"),
        ({"layers_block_type": ["mamba"]}, "contradicts"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_foreign_configs_are_refused(change: dict[str, Any], says: str) -> None:
    config = {"model_type": "nemotron_h", **SHAPE.to_hf(), **change}
    with pytest.raises(UserError) as caught:
        ParentShape.from_hf({k: v for k, v in config.items() if v is not None})
    assert says in str(caught.value) and "\n" not in str(caught.value)
