"""A mix is the differentiable twin of a submodel: masks are p @ T, widths p @ choices."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import HETEROGENEOUS, LAYER_ORDER, soft_mix, spec_of, subspace

from elastic_megatron.ops import SubmodelMix
from elastic_megatron.space import SubmodelSpec

SPACE = subspace()


def random_spec(seed: int) -> SubmodelSpec:
    r = random.Random(seed)
    widths: dict[str, Any] = {}
    for a in SPACE.axes:
        choices = SPACE.choices_of(a)
        widths[a] = (
            [r.choice(choices) for _ in SPACE.layers(a)] if a in SPACE.per_layer else r.choice(choices)
        )
    return SubmodelSpec.of(widths)


@given(st.integers(0, 10**6))
def test_one_hot_masks_are_the_kept_components(seed: int) -> None:
    spec = random_spec(seed)
    mix = SubmodelMix.one_hot(SPACE, spec)
    for a in SPACE.axes:
        for position in range(len(SPACE.layers(a)) or 1):
            mask, width = mix.mask(a, position), spec.at(a, position)
            assert set(mask.tolist()) <= {0.0, 1.0} and float(mix.width(a, position)) == width == float(
                mask.sum()
            )
            kept = LAYER_ORDER[:width] if a == "num_layers" else SPACE.kept(a, width)
            assert mask.nonzero().flatten().tolist() == sorted(kept)
    assert mix.argmax() == spec
    assert [float(mix.keep(i)) for i in range(7)] == [float(i in SPACE.kept_layers(spec)) for i in range(7)]


@given(st.integers(0, 10**6))
def test_soft_masks_are_expectations_of_hard_ones(seed: int) -> None:
    mix = soft_mix(SPACE, seed)
    for a in SPACE.axes:
        for position in range(len(SPACE.layers(a)) or 1):
            p = mix.probs[a][position] if mix.probs[a].dim() == 2 else mix.probs[a]
            expected = 0
            for c, prob in zip(SPACE.choices_of(a), p, strict=True):
                widths = [c] * len(SPACE.layers(a)) if a in SPACE.per_layer else c
                hard = SubmodelMix.one_hot(SPACE, spec_of(SPACE, **{a: widths}), dtype=torch.float64)
                expected = expected + prob * hard.mask(a, position)
            assert torch.allclose(mix.mask(a, position), expected, rtol=0, atol=1e-12)  # type: ignore[arg-type]
            assert torch.allclose(mix.width(a, position), mix.mask(a, position).sum(), atol=1e-9)


def test_mixes_pass_through_their_tensors() -> None:
    mix = soft_mix(SPACE, 3)
    again = mix.with_tensors([t.detach().clone() for t in mix.tensors()])
    assert list(again.probs) == list(SPACE.axes)
    assert all(torch.equal(again.probs[a], mix.probs[a]) for a in SPACE.axes)


def test_a_mix_without_depth_keeps_every_layer() -> None:
    space = subspace("ME")
    assert SubmodelMix.one_hot(space, space.smallest()).keep(1) is None


def test_masks_of_one_space_are_not_those_of_another() -> None:
    """Tables are cached by space: two spaces that differ only in lanes or layer order must not share one."""
    other = SPACE.with_layer_order(range(7))
    specs = [s.smallest() for s in (SPACE, other)]
    a, b = (
        SubmodelMix.one_hot(s, spec).mask("num_layers") for s, spec in zip((SPACE, other), specs, strict=True)
    )
    assert not torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_hot_masks_are_exact_in_every_type(dtype: torch.dtype) -> None:
    mix = SubmodelMix.one_hot(SPACE, spec_of(SPACE, **HETEROGENEOUS), dtype=dtype)
    assert all(set(mix.mask(a).tolist()) <= {0.0, 1.0} for a in SPACE.axes)
