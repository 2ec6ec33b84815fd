"""A family says which of its sizes are not what was asked for, and what would be."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import subspace

from elastic_megatron.router.loss import relative_cost
from elastic_megatron.router.missed import REFUSED, TOLERATED, missed, nearest
from elastic_megatron.space import Budget, SubmodelSpec

SPACE = subspace()


def drawn(seed: int) -> SubmodelSpec:
    rng = random.Random(seed)
    return SubmodelSpec.of({axis: rng.choice(SPACE.choices_of(axis)) for axis in SPACE.axes})


@settings(max_examples=80)
@given(
    st.integers(0, 10_000),
    st.floats(0.3, 1.0),
    st.sampled_from(["active_params", "total_params", "memory_bytes"]),
)
def test_what_is_missed_is_what_costs_more_or_less_than_was_asked(
    seed: int, target: float, metric: str
) -> None:
    """``off`` is cost / target - 1; the size that is offered is legal, not farther off, and changes as few axes as a way
    of single changes takes, each to the nearest; where it is still off, no single change leads nearer."""
    spec, budget = drawn(seed), Budget("small", metric, target)
    off = relative_cost(SPACE, budget, spec) - 1
    found = missed(SPACE, [budget], {"small": spec})
    assert len(found) == (abs(off) > TOLERATED)
    for size in found:
        assert (size.off, size.refused) == (off, abs(off) > REFUSED)
        assert size.realized == pytest.approx(size.target * (1 + off))
        assert size.nearest == nearest(SPACE, budget, spec)
        assert size.nearest_off == relative_cost(SPACE, budget, size.nearest) - 1
        assert abs(size.nearest_off) <= abs(off)
        assert all(size.nearest[axis] in SPACE.choices_of(axis) for axis in SPACE.axes)
        if abs(size.nearest_off) > TOLERATED:
            for axis in SPACE.axes:
                for width in SPACE.choices_of(axis):
                    other = SubmodelSpec.of(size.nearest.to_dict() | {axis: width})
                    assert abs(relative_cost(SPACE, budget, other) - 1) >= abs(size.nearest_off)


def test_it_says_by_how_much_and_what_would_meet_it() -> None:
    budget, spec = Budget("half", "active_params", 0.5), SPACE.full()
    (size,) = missed(SPACE, [Budget("full", "active_params", 1.0), budget], {"full": spec, "half": spec})
    said = str(size)
    assert said.startswith(
        "size half costs 100.0% of the parent in active_params, +100.0% off its budget of 50.0%; with "
    )
    changed = dict(part.split("=") for part in said.split("; with ")[1].split(" it would be")[0].split())
    assert SubmodelSpec.of(spec.to_dict() | {a: int(w) for a, w in changed.items()}) == size.nearest
