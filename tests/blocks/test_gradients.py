"""Law 5: gradients depend neither on recomputation, nor on what else is in flight, nor on how we cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import (
    HETEROGENEOUS,
    build_elastic,
    build_slice,
    gradients,
    one_hot,
    recomputing,
    run,
    scalar,
    soft_mix,
    spec_of,
    subspace,
    tokens,
    worst,
)
from torch import Tensor

from elastic_megatron.checkpoint.slice import slice_state
from elastic_megatron.ops import SubmodelMix, gumbel_noise, gumbel_softmax
from elastic_megatron.space import SubmodelSpec

TIGHT = 1e-12
SPACE = subspace()
SMALL, MIXED = SPACE.smallest(), spec_of(SPACE, **HETEROGENEOUS)
METHODS = [("uniform", 1), ("uniform", 3), ("uniform", 7), ("block", 4)]

pytestmark = pytest.mark.usefixtures("fp64")


@pytest.fixture(scope="module")
def model(megatron: Any) -> Any:
    return build_elastic(SPACE).train()


def leaf(mix: SubmodelMix) -> SubmodelMix:
    return mix.with_tensors([t.detach().clone().requires_grad_() for t in mix.tensors()])


def straight_through(seed: int) -> SubmodelMix:
    """Hard in the forward pass, soft in the backward pass: what the budget router hands over."""
    probs = {}
    for a, p in soft_mix(SPACE, seed).probs.items():
        logits = p.detach().log().requires_grad_()
        probs[a] = gumbel_softmax(logits, gumbel_noise(("noise", seed, a), logits), 0.7, hard=True)
        probs[a].retain_grad()
    return SubmodelMix(SPACE, probs)


def two_in_flight(model: Any, first: SubmodelMix, second: SubmodelMix) -> dict[str, Tensor]:
    """Both forward passes, then both backward passes, last first: the order of a 1F1B pipeline's middle."""
    model.zero_grad()
    losses = [
        scalar(run(model, mix, tokens(SPACE, 2, 11, seed)), seed) for seed, mix in enumerate((first, second))
    ]
    for loss in reversed(losses):
        loss.backward()
    return everything(model, first, second)


def one_after_the_other(model: Any, first: SubmodelMix, second: SubmodelMix) -> dict[str, Tensor]:
    model.zero_grad()
    for seed, mix in enumerate((first, second)):
        scalar(run(model, mix, tokens(SPACE, 2, 11, seed)), seed).backward()
    return everything(model, first, second)


def everything(model: Any, *mixes: SubmodelMix) -> dict[str, Tensor]:
    found = gradients(model)
    for i, mix in enumerate(mixes):
        for a, p in mix.probs.items():
            assert p.grad is not None, f"no gradient reaches {a}"
            found[f"mix {i} {a}"] = p.grad.clone()
    return found


MIXES = {
    "hard": lambda: (leaf(one_hot(SPACE, SMALL)), leaf(one_hot(SPACE, MIXED))),
    "soft": lambda: (leaf(soft_mix(SPACE, 1)), leaf(soft_mix(SPACE, 2))),
    "straight-through": lambda: (straight_through(3), straight_through(4)),
}


@pytest.mark.parametrize("kind", MIXES)
@pytest.mark.parametrize(("method", "layers"), METHODS)
def test_gradients_with_recomputation_equal_those_without(
    model: Any, method: str, layers: int, kind: str
) -> None:
    plain = one_after_the_other(model, *MIXES[kind]())
    with recomputing(model, method, layers):
        recomputed = two_in_flight(model, *MIXES[kind]())
    assert worst(recomputed, plain)[0] <= TIGHT


@pytest.mark.parametrize("kind", MIXES)
def test_gradients_of_two_micro_batches_in_flight_equal_one_after_the_other(model: Any, kind: str) -> None:
    assert worst(two_in_flight(model, *MIXES[kind]()), one_after_the_other(model, *MIXES[kind]()))[0] <= TIGHT


@pytest.mark.parametrize("kind", MIXES)
def test_gradients_with_selective_attention_recomputation(model: Any, kind: str) -> None:
    selective = build_elastic(
        SPACE, recompute_granularity="selective", recompute_modules=["core_attn"]
    ).train()
    selective.load_state_dict(model.state_dict())
    assert (
        worst(two_in_flight(selective, *MIXES[kind]()), one_after_the_other(model, *MIXES[kind]()))[0]
        <= TIGHT
    )


@pytest.mark.parametrize("spec", [SMALL, MIXED, spec_of(SPACE, num_layers=5, hidden_size=27)],
                         ids=["smallest", "heterogeneous", "shallow"])  # fmt: skip
def test_masked_gradients_are_the_sliced_ones_in_place(model: Any, spec: SubmodelSpec) -> None:
    sliced, inputs = build_slice(model, SPACE, spec).train(), tokens(SPACE, 3, 11)
    model.zero_grad()
    scalar(run(model, one_hot(SPACE, spec), inputs)).backward()
    scalar(sliced(*inputs, None)).backward()
    masked, cut = gradients(model), gradients(sliced)
    assert worst(dict(slice_state(SPACE, spec, masked.items())), cut)[0] <= TIGHT
    # and nothing anywhere else: the squares inside the slice are all the squares there are
    inside, total = (sum(float(g.square().sum()) for g in some.values()) for some in (cut, masked))
    assert abs(inside / total - 1) <= TIGHT
    for name, g in masked.items():
        assert g.isfinite().all(), name


def test_gradient_of_a_soft_mix_is_the_slope_of_the_loss(model: Any) -> None:
    """Along a random direction of the probabilities, against central differences."""
    mix, inputs = leaf(soft_mix(SPACE, 5)), tokens(SPACE, 1, 9)
    scalar(run(model, mix, inputs)).backward()
    g = torch.Generator().manual_seed(9)
    direction = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in mix.tensors()]
    slope = sum((p.grad * d).sum() for p, d in zip(mix.tensors(), direction, strict=True))  # type: ignore[operator]

    def moved(step: float) -> float:
        pairs = zip(mix.tensors(), direction, strict=True)
        with torch.no_grad():
            return float(scalar(run(model, mix.with_tensors([p + step * d for p, d in pairs]), inputs)))

    step = 1e-6
    assert float(slope) == pytest.approx((moved(step) - moved(-step)) / (2 * step), rel=1e-5)


def test_a_mix_is_gone_when_its_context_ends(model: Any) -> None:
    inputs = tokens(SPACE, 2, 9)
    with torch.no_grad():
        before = run(model, None, inputs)
        run(model, one_hot(SPACE, SMALL), inputs)
        assert torch.equal(run(model, None, inputs), before)
        with pytest.raises(RuntimeError):
            run(model, one_hot(SPACE, SMALL), (inputs[0].float(), inputs[1]))
        assert torch.equal(model(*inputs, None), before)
