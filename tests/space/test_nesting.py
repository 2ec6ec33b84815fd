"""Law 4: a slice of a slice is the slice; smaller submodels are prefixes of larger ones."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import PATTERN, subspace
from torch import Tensor

from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.nested import left_out, nested_manifest
from elastic_megatron.checkpoint.slice import permute_state, slice_state
from elastic_megatron.checkpoint.stored import model_tensors
from elastic_megatron.cost import account
from elastic_megatron.errors import UserError
from elastic_megatron.ops.locate import locate
from elastic_megatron.space import ElasticSpace, ParentShape, SubmodelSpec, apart

State = dict[str, Tensor]
SPACE = subspace()


def numbered(parent: ParentShape) -> State:
    """A state whose every element is unique, so that equal means: the same elements."""
    state, start = {}, 0
    for tensor in model_tensors(parent):
        count = torch.Size(tensor.shape).numel()
        state[tensor.name] = torch.arange(start, start + count).view(tensor.shape)
        start += count
    return state


STATE = numbered(SPACE.parent)


def draw_spec(
    rng: random.Random, space: ElasticSpace, below: SubmodelSpec | None = None, even: bool = False
) -> SubmodelSpec:
    """A random submodel, nested in ``below``; ``even``: with equal widths in all layers."""
    widths: dict[str, Any] = {}
    for a in space.axes:

        def one(position: int, a: str = a) -> int:
            return rng.choice([c for c in space.choices_of(a) if below is None or c <= below.at(a, position)])

        per_layer = a in space.per_layer and not even
        widths[a] = [one(i) for i in range(len(space.layers(a)))] if per_layer else one(0)
    return SubmodelSpec.of(widths)


def same(a: State, b: State) -> bool:
    return list(a) == list(b) and all(torch.equal(a[n], b[n]) for n in b)


@settings(max_examples=60)
@given(st.integers(0, 10**9), st.lists(st.integers(0, 6), unique=True, min_size=7, max_size=7))
def test_slice_of_a_slice_is_the_slice(seed: int, layer_order: list[int]) -> None:
    rng, space = random.Random(seed), SPACE.with_layer_order(layer_order)
    outer = draw_spec(rng, space, even=True)
    inner = draw_spec(rng, space, below=outer)
    assert inner <= outer
    manifest = Manifest(space.parent, space, submodels={"outer": outer, "inner": inner})
    cut = nested_manifest(manifest, "outer")
    assert cut.space is not None and cut.shape == space.shape_of(outer)
    once = dict(slice_state(space, outer, STATE.items()))
    twice = dict(slice_state(cut.space, cut.submodels["inner"], once.items()))
    assert same(twice, dict(slice_state(space, inner, STATE.items())))
    assert account(cut.space, cut.submodels["inner"]).total_params == account(space, inner).total_params


@settings(max_examples=30)
@given(st.integers(0, 10**9))
def test_a_slice_has_the_shapes_of_its_model(seed: int) -> None:
    spec = draw_spec(random.Random(seed), SPACE, even=True)
    shape = SPACE.shape_of(spec)
    cut = dict(slice_state(SPACE, spec, STATE.items()))
    assert {n: tuple(t.shape) for n, t in cut.items()} == {t.name: t.shape for t in model_tensors(shape)}
    assert sum(t.numel() for t in cut.values()) == account(SPACE, spec).total_params


def test_the_full_slice_is_the_parent() -> None:
    assert same(dict(slice_state(SPACE, SPACE.full(), STATE.items())), STATE)


@settings(max_examples=30)
@given(st.integers(0, 10**9))
def test_a_smaller_submodel_holds_no_element_that_a_larger_one_lacks(seed: int) -> None:
    rng = random.Random(seed)
    outer = draw_spec(rng, SPACE)
    inner = draw_spec(rng, SPACE, below=outer)

    def elements(spec: SubmodelSpec) -> set[int]:
        return {int(x) for t in dict(slice_state(SPACE, spec, STATE.items())).values() for x in t.flatten()}

    assert elements(inner) <= elements(outer)


def test_slicing_streams() -> None:
    """One tensor in, one tensor out: nothing is read ahead."""
    seen: list[str] = []

    def stream() -> Any:
        for item in STATE.items():
            seen.append(item[0])
            yield item

    iterator = slice_state(SPACE, SPACE.full(), stream())
    for count, _ in enumerate(iterator, 1):
        assert len(seen) == count


def test_permuting_a_whole_state_and_back_is_the_identity() -> None:
    rng, parent = random.Random(0), SPACE.parent
    orders: dict[Any, Any] = {"hidden_size": rng.sample(range(35), 35)}
    for i, symbol in enumerate(PATTERN):
        if symbol == "M":
            orders[i, "mamba_num_heads"] = [*rng.sample(range(3), 3), *rng.sample(range(3, 6), 3)]
            orders[i, "mamba_state_dim"] = rng.sample(range(7), 7)
        elif symbol == "E":
            orders[i, "num_moe_experts"] = rng.sample(range(8), 8)
            orders[i, "moe_ffn_hidden_size"] = [rng.sample(range(11), 11) for _ in range(8)]
    there = dict(permute_state(parent, orders, STATE.items()))
    assert not same({n: there[n] for n in STATE}, STATE)

    def inverse(order: list[int]) -> list[int]:
        return [order.index(i) for i in range(len(order))]

    back: dict[Any, Any] = {}
    for key, order in orders.items():
        if key[1] == "moe_ffn_hidden_size":
            # the orders of experts follow them to their new numbers
            experts = orders[key[0], "num_moe_experts"]
            back[key] = [inverse(order[experts[new]]) for new in range(8)]
        else:
            back[key] = inverse(order)
    restored = dict(permute_state(parent, back, there.items()))
    assert same({n: restored[n] for n in STATE}, STATE)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.mixer.unknown",
        "decoder.layers.9.norm.weight",
        "rotary.weight",
        "decoder.layers.1.mlp.experts.local_experts.0.linear_fc3.weight",
    ],
)
def test_a_tensor_that_the_fact_table_does_not_know_is_an_error(name: str) -> None:
    with pytest.raises(UserError, match="belongs to no block"):
        locate(SPACE.parent, name)


@pytest.mark.parametrize(
    ("name", "layer", "expert"),
    [
        ("decoder.layers.1.mlp.experts.local_experts.7.linear_fc1.weight", 1, 7),
        ("decoder.layers.1.mlp.experts.linear_fc2.weight5", 1, 5),
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", 3, None),
        ("decoder.layers.0.mixer.conv1d.weight", 0, None),
        ("decoder.final_layernorm.weight", None, None),
    ],
)
def test_names_of_both_specs_are_found(name: str, layer: int | None, expert: int | None) -> None:
    found = locate(SPACE.parent, name)
    assert (found[0], found[2]) == (layer, expert)


def test_grouped_experts_are_renumbered_under_their_own_names() -> None:
    spec = SubmodelSpec.of({**SPACE.full().to_dict(), "num_moe_experts": 4})
    rows = [(f"decoder.layers.1.mlp.experts.linear_fc1.weight{e}", torch.full((11, 35), e)) for e in range(8)]
    cut = [(n, int(t[0, 0])) for n, t in slice_state(SPACE, spec, rows)]
    # two lanes of four experts: the first two of each
    assert cut == [
        (f"decoder.layers.1.mlp.experts.linear_fc1.weight{new}", old) for new, old in enumerate((0, 1, 4, 5))
    ]


@settings(max_examples=60)
@given(st.integers(0, 10_000))
def test_a_family_is_nested_where_no_line_says_otherwise(seed: int) -> None:
    """By definition: of two sizes one keeps, on every axis and layer, at most what the other keeps. A line for each pair
    that is not so, and it is true: the size that it names first has more than the other, in each of the axes it names."""
    rng = random.Random(seed)
    family = {name: draw_spec(rng, SPACE, even=rng.random() < 0.5) for name in "abc"}

    def keeps(spec: SubmodelSpec) -> list[int]:
        return [
            spec.at(a, i)
            for a in SPACE.axes
            for i in range(len(SPACE.layers(a)) if a in SPACE.per_layer else 1)
        ]

    def inside(x: str, y: str) -> bool:
        return all(mine <= theirs for mine, theirs in zip(keeps(family[x]), keeps(family[y]), strict=True))

    pairs = [(x, y) for x in "abc" for y in "abc" if x < y and not inside(x, y) and not inside(y, x)]
    lines = apart(family)
    assert [set(line.split(":")[0].split(" is not part of ")) for line in lines] == [
        set(pair) for pair in pairs
    ]
    for line in lines:
        first, outer = line.split(":")[0].split(" is not part of ")
        named = {
            part.split()[0]
            for part in line.split("(")[1].rstrip(")").split(", ")
            if "not" not in part.split()[0]
        }
        assert named == set(family[first].wider_than(family[outer]))


def test_what_is_not_part_of_a_size_is_named_when_it_is_cut_out() -> None:
    """And what contains it is not: it was not asked for."""
    widths = {
        "large": {},
        "medium": {"num_moe_experts": 4},
        "small": {"hidden_size": 20, "num_moe_experts": 6},
    }
    space = ElasticSpace.build(SPACE.parent, {"hidden_size": [20], "num_moe_experts": [4, 6]})
    sizes = {name: SubmodelSpec.of(space.full().to_dict() | own) for name, own in widths.items()}
    family = Manifest(shape=space.parent, space=space, submodels=sizes)
    assert left_out(family, "large") == []
    assert left_out(family, "medium") == [
        "small is not part of medium: it has more (num_moe_experts 6, not 4); it is not in what was cut out"
    ]
    assert list(nested_manifest(family, "medium").submodels) == ["medium"]
