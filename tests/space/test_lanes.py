"""Lanes: the first k of every lane are exactly the best k x L, for any number of ranks that divides L."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import SHAPE

from elastic_megatron.space import ElasticSpace, stored_order, undeal


@st.composite
def rankings(draw: Any) -> tuple[list[int], int, int]:
    """A ranking group after group, its lanes and its groups."""
    groups, per_group, block = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    size = per_group * block
    ranked = [g * size + i for g in range(groups) for i in draw(st.permutations(range(size)))]
    return ranked, groups * per_group, groups


@given(rankings(), st.data())
def test_first_of_each_lane_are_the_best_overall(case: tuple[list[int], int, int], data: Any) -> None:
    ranked, lanes, groups = case
    stored, block, size = stored_order(ranked, lanes, groups), len(ranked) // lanes, len(ranked) // groups
    assert sorted(stored) == sorted(ranked)
    k = data.draw(st.integers(0, block))
    kept = {stored[lane * block + i] for lane in range(lanes) for i in range(k)}
    best = {c for g in range(groups) for c in ranked[g * size : g * size + k * lanes // groups]}
    assert kept == best


@given(rankings())
def test_groups_stay_in_their_places(case: tuple[list[int], int, int]) -> None:
    ranked, lanes, groups = case
    stored, size = stored_order(ranked, lanes, groups), len(ranked) // groups
    assert [c // size for c in stored] == [c // size for c in ranked]


@given(rankings(), st.integers(1, 12))
def test_every_rank_holds_an_equal_share(case: tuple[list[int], int, int], ranks: int) -> None:
    ranked, lanes, groups = case
    if lanes % ranks:
        return
    stored, block, per_rank = stored_order(ranked, lanes, groups), len(ranked) // lanes, len(ranked) // ranks
    for k in range(block + 1):
        kept = {stored[lane * block + i] for lane in range(lanes) for i in range(k)}
        held = [sum(c in kept for c in stored[r * per_rank : (r + 1) * per_rank]) for r in range(ranks)]
        assert len(set(held)) == 1


@given(rankings())
def test_undealing_is_the_inverse(case: tuple[list[int], int, int]) -> None:
    ranked, lanes, groups = case
    stored = stored_order(ranked, lanes, groups)
    assert [stored[i] for i in undeal(len(ranked), lanes, groups)] == ranked


def test_one_lane_is_the_plain_ranking() -> None:
    assert stored_order([3, 1, 0, 2], 1) == [3, 1, 0, 2] == [undeal(4, 1)[i] for i in (3, 1, 0, 2)]


def test_two_lanes_by_hand() -> None:
    assert stored_order([5, 3, 1, 0, 2, 4], 2) == [5, 1, 2, 3, 0, 4]
    assert stored_order([1, 0, 3, 2], 2, groups=2) == [1, 0, 3, 2]


@pytest.mark.parametrize(
    ("axis", "lanes"),
    [
        ("num_moe_experts", 2),
        ("ffn_hidden_size", 7),
        ("mamba_num_heads", None),
        ("num_attention_heads", 2),
        ("hidden_size", None),
    ],
)
def test_a_space_keeps_the_best_of_a_dealt_ranking(axis: str, lanes: int | None) -> None:
    groups = SHAPE.groups(axis)
    step = lanes or groups
    widths = [w for w in range(1, SHAPE.size(axis)) if w % step == 0 and w >= SHAPE.moe_router_topk]
    space = ElasticSpace.build(SHAPE, {axis: widths}, {axis: lanes} if lanes else {})
    ranked = [
        g * (SHAPE.size(axis) // groups) + i
        for g in range(groups)
        for i in reversed(range(SHAPE.size(axis) // groups))
    ]
    stored = stored_order(ranked, space.lanes_of(axis), groups)
    for width in space.choices_of(axis):
        share = SHAPE.size(axis) // groups
        best = {c for g in range(groups) for c in ranked[g * share : g * share + width // groups]}
        assert {stored[p] for p in space.kept(axis, width)} == best
