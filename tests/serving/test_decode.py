"""Token by token with caches computes what the whole prefix does, for every kind of layer and every submodel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import CHOICES, HETEROGENEOUS, build_elastic, build_slice, one_hot, relative, run, spec_of, subspace
from torch import Tensor

from elastic_megatron.blocks import SlicedModel, running
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.serving.decode import Cache, Sampling, nucleus, write
from elastic_megatron.space import ElasticSpace

TIGHT = 1e-12
SPACE = subspace()
LENGTH = 21
SUBMODELS: dict[str, dict[str, Any]] = {
    **{f"{axis}={w}": {axis: w} for axis, widths in CHOICES.items() for w in widths},
    "smallest": SPACE.smallest().to_dict(),
    "heterogeneous": HETEROGENEOUS,
}


@pytest.fixture(scope="module")
def model(megatron: Any) -> Any:
    return build_elastic(SPACE).eval()


def ids(space: ElasticSpace, length: int = LENGTH) -> Tensor:
    return torch.randint(
        0, space.parent.vocab_size, (length,), generator=torch.Generator().manual_seed(length)
    )


def whole(model: Any, mix: SubmodelMix | None, tokens: Tensor) -> Tensor:
    """Logits [length, vocabulary] of one pass."""
    with torch.no_grad():
        return run(model, mix, (tokens[None], torch.arange(len(tokens))[None]))[0]


def decoded(model: Any, tokens: Tensor, prompt: int) -> Tensor:
    """Logits after the prompt and after each token behind it."""
    cache, given = Cache(model, len(tokens)), tokens.tolist()
    first = cache.advance(given[:prompt])
    return torch.stack([first, *(cache.advance([token]) for token in given[prompt:])])


def agree(model: Any, space: ElasticSpace, mix: SubmodelMix | None, prompt: int) -> None:
    tokens = ids(space)
    wanted = whole(model, mix, tokens)[prompt - 1 :]
    with running(model, mix):
        got = decoded(model, tokens, prompt)
    assert wanted.std() > 0.05, "the comparison is about nothing"
    for step, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert relative(a, b) <= TIGHT, f"token {step} after the prompt"


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("prompt", [1, 3, 4, 17, LENGTH])
def test_parent_after_prompts_shorter_and_longer_than_its_convolution(model: Any, prompt: int) -> None:
    agree(model, SPACE, None, prompt)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("widths", [pytest.param(w, id=n) for n, w in SUBMODELS.items()])
def test_submodel(model: Any, widths: dict[str, Any]) -> None:
    agree(model, SPACE, one_hot(SPACE, spec_of(SPACE, **widths)), 6)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("widths", [pytest.param(w, id=n) for n, w in SUBMODELS.items()])
def test_submodel_on_its_own_widths(model: Any, widths: dict[str, Any]) -> None:
    mix, tokens = one_hot(SPACE, spec_of(SPACE, **widths)), ids(SPACE)
    with running(model, mix):
        masked = decoded(model, tokens, 6)
    with SlicedModel(model).running(mix) as submodel:
        assert submodel is not model
        assert relative(decoded(submodel, tokens, 6), masked) <= TIGHT


@pytest.mark.usefixtures("megatron", "fp64")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("pattern", ["M", "*", "E", "-"])
def test_each_kind_of_layer_alone(pattern: str, groups: int) -> None:
    space = subspace(pattern, mamba_num_groups=groups, num_query_groups=groups, per_layer=False)
    model = build_elastic(space).eval()
    agree(model, space, None, 5)
    agree(model, space, one_hot(space, space.smallest()), 5)


@pytest.mark.usefixtures("fp64")
def test_masked_is_sliced(model: Any) -> None:
    """The plain model of the cut weights, from its own caches."""
    spec, tokens = spec_of(SPACE, **HETEROGENEOUS), ids(SPACE)
    sliced = build_slice(model, SPACE, spec).eval()
    with running(model, one_hot(SPACE, spec)):
        masked = decoded(model, tokens, 6)
    assert relative(masked, decoded(sliced, tokens, 6)) <= TIGHT


@pytest.mark.usefixtures("megatron")
def test_fp32_is_within_rounding() -> None:
    model = build_elastic(SPACE, torch.float32).eval()
    mix = SubmodelMix.one_hot(SPACE, spec_of(SPACE, **HETEROGENEOUS))
    wanted = whole(model, mix, ids(SPACE))[5:]
    with running(model, mix):
        assert relative(decoded(model, ids(SPACE), 6), wanted) < 2e-6


def test_writing_is_the_loop_over_whole_prefixes(model: Any) -> None:
    prompt, expected = ids(SPACE, 5).tolist(), ids(SPACE, 5).tolist()
    for _ in range(9):
        expected.append(int(whole(model, None, torch.tensor(expected))[-1].argmax()))
    new = expected[5:]
    choose, seen = Sampling().chooser(), []
    written = write(model, prompt, 9, stops=(), choose=choose, watch=seen.append)
    assert written.tokens == seen == new and written.stopped_at is None
    assert len(set(new)) > 3, "the comparison is about nothing"
    stop = new[4]
    cut = write(model, prompt, 9, stops={stop}, choose=choose)
    assert cut.tokens == new[: new.index(stop)] and cut.stopped_at == stop
    assert write(model, prompt, 0, stops=(), choose=choose).tokens == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(lambda p: sum(p) > 0.01), st.floats(0.01, 1))
def test_nucleus_keeps_the_fewest_tokens_that_reach_the_sum(weights: list[float], top_p: float) -> None:
    probs = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    kept = nucleus(probs, top_p)
    inside = probs[kept > 0]
    assert torch.equal(kept[kept > 0], inside) and len(inside)
    assert inside.sum() >= top_p - 1e-9 or len(inside) == int((probs > 0).sum())
    assert inside.sum() - inside.min() < top_p, "one token fewer would do"
    assert inside.min() >= probs[kept == 0].max() if (kept == 0).any() else True


@settings(max_examples=3)
@given(st.integers(0, 2**31))
def test_draws_are_those_of_the_seed_and_follow_the_distribution(seed: int) -> None:
    logits = torch.tensor([0.5, 2.0, 1.0, -30.0])
    first, again = (Sampling(0.7, seed=seed).chooser() for _ in range(2))
    drawn = [first(logits) for _ in range(600)]
    assert drawn == [again(logits) for _ in range(600)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
    assert torch.allclose(shares, torch.softmax(logits / 0.7, -1), atol=0.08)
    only = Sampling(0.7, top_p=0.5, seed=seed).chooser()
    assert {only(logits) for _ in range(50)} == {1}
