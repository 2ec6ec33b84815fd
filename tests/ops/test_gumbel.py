"""Randomness is a pure function of its key, and the Gumbel-Softmax built on it."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_megatron.ops import draw_index, draw_several, gumbel_noise, gumbel_softmax, uniform

# quotients of integers: hypothesis refuses st.floats() where denormals are flushed, as runtime.start asks
LOGITS = st.integers(-8000, 8000).map(lambda i: i / 1000)
SHARES = st.integers(1, 100).map(lambda i: i / 100)
KEYS = st.tuples(
    st.integers(0, 2**31), st.sampled_from(["gumbel", "budget"]), st.integers(0, 10**6), st.integers(0, 63)
)


@given(KEYS, st.integers(0, 1000))
def test_noise_is_a_function_of_its_key_alone(key: tuple, disturbance: int) -> None:
    like = torch.zeros(3, 5)
    torch.manual_seed(0)
    first = gumbel_noise(key, like)
    torch.manual_seed(disturbance)
    state = torch.get_rng_state()
    assert torch.equal(gumbel_noise(key, like), first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was touched"


@given(KEYS, KEYS)
def test_other_keys_give_other_noise(a: tuple, b: tuple) -> None:
    assert (a == b) == torch.equal(uniform(a, (4,)), uniform(b, (4,)))


def test_keys_are_not_concatenated_into_one_another() -> None:
    assert not torch.equal(uniform((1, 23), (4,)), uniform((12, 3), (4,)))
    assert not torch.equal(uniform((1, "2"), (4,)), uniform((1, 2), (4,)))


def test_noise_is_the_same_in_another_process() -> None:
    code = "from elastic_megatron.ops import uniform; print(uniform((7, 'budget', 3, 1), (3,)).tolist())"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert out.stdout.strip() == str(uniform((7, "budget", 3, 1), (3,)).tolist())


def test_noise_is_standard_gumbel() -> None:
    """Mean and variance to 5 standard errors; extreme keys stay finite."""
    n = 200_000
    noise = gumbel_noise((1, "gumbel", 0, 0, 0), torch.zeros(n, dtype=torch.float64))
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772156649, abs=5 * math.pi / math.sqrt(6 * n))
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.03)


@pytest.mark.parametrize(("position", "change"), [(0, 2), (2, 1), (3, 1), (4, 1), (5, "num_moe_experts")])
def test_noise_is_independent_along_every_part_of_the_key(position: int, change: int | str) -> None:
    """Correlation over 20,000 draws below 5 standard errors, for seed, step, micro-batch, rank and axis."""
    a, b, n = [], [], 20_000
    for i in range(n // 20):
        key: list = [1234, "gumbel", 2 * i, 0, 0, "hidden_size"]
        other = list(key)
        other[position] = change if isinstance(change, str) else key[position] + change
        a.append(gumbel_noise(tuple(key), torch.zeros(20)))
        b.append(gumbel_noise(tuple(other), torch.zeros(20)))
    correlation = torch.corrcoef(torch.stack([torch.cat(a), torch.cat(b)]))[0, 1]
    assert abs(float(correlation)) < 5 / math.sqrt(n)


def test_sampled_choices_have_the_softmax_frequencies() -> None:
    """The Gumbel-max theorem, over 20,000 keys."""
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0])
    noise = torch.stack([gumbel_noise((5, i), logits) for i in range(20_000)])
    found = torch.bincount((logits + noise).argmax(-1), minlength=4) / 20_000
    assert torch.allclose(found, torch.softmax(logits, -1), atol=0.015)


@given(st.lists(LOGITS, min_size=2, max_size=6), st.integers(5, 200).map(lambda i: i / 100), KEYS)
def test_hard_samples_are_one_hot_with_the_soft_gradient(values: list[float], tau: float, key: tuple) -> None:
    weigh = torch.arange(1.0, len(values) + 1, dtype=torch.float64)
    grads, outs = [], []
    for hard in (False, True):
        logits = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        out = gumbel_softmax(logits, gumbel_noise(key, logits), tau, hard)
        (out * weigh).sum().backward()
        grads.append(logits.grad)
        outs.append(out.detach())
    soft, hard_out = outs
    assert torch.equal(hard_out, torch.nn.functional.one_hot(soft.argmax(), len(values)).double())
    assert torch.allclose(soft.sum(), torch.ones((), dtype=torch.float64))
    assert torch.equal(grads[0], grads[1])


def test_low_temperatures_sharpen() -> None:
    logits = torch.tensor([0.0, 0.5, 1.0])
    noise = gumbel_noise((1,), logits)
    tops = [float(gumbel_softmax(logits, noise, tau, False).max()) for tau in (2.0, 1.0, 0.3, 0.05)]
    assert tops == sorted(tops) and tops[-1] > 0.99


@pytest.mark.parametrize(
    "probs", [(0.5, 0.3, 0.2), (0.0, 1.0, 0.0), (1 / 3, 1 / 3, 1 / 3), (0.0, 0.25, 0.75)]
)
def test_draws_have_their_frequencies(probs: tuple[float, ...]) -> None:
    n = 10_000
    drawn = torch.bincount(
        torch.tensor([draw_index((1234, "budget", i, 0, 0), probs) for i in range(n)]), minlength=3
    )
    for count, p in zip(drawn.tolist(), probs, strict=True):
        assert abs(count / n - p) <= 5 * math.sqrt(p * (1 - p) / n), (drawn, probs)
        assert p > 0 or count == 0


@given(KEYS, st.lists(SHARES, min_size=1, max_size=5))
def test_draws_are_functions_of_their_key(key: tuple, weights: list[float]) -> None:
    probs = [w / sum(weights) for w in weights]
    assert draw_index(key, probs) == draw_index(key, probs) in range(len(probs))


@given(KEYS, st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(any), st.data())
def test_several_draws_differ_and_have_a_weight(key: tuple, shares: list[int], data: st.DataObject) -> None:
    probs = [share / sum(shares) for share in shares]
    count = data.draw(st.integers(1, sum(share > 0 for share in shares)))
    drawn = draw_several(key, probs, count)
    assert len({i for i, _ in drawn}) == len(drawn) == count
    assert all(probs[i] > 0 and 0 < weight <= 1 + 1e-12 for i, weight in drawn)
    if count == sum(share > 0 for share in shares):
        assert dict(drawn) == pytest.approx({i: p for i, p in enumerate(probs) if p}) or count == 1


@pytest.mark.parametrize(
    "probs", [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.2, 0.1), (0.5, 0.0, 0.3, 0.15, 0.05)], ids=str
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_weighted_draws_have_the_expectation_of_one(probs: tuple[float, ...], count: int) -> None:
    """An index weighs on average what its probability is, to five standard errors."""
    trials, total = 4000, dict.fromkeys(range(len(probs)), 0.0)
    for trial in range(trials):
        for i, weight in draw_several((trial, "several"), probs, count):
            total[i] += weight
    for i, p in enumerate(probs):
        assert total[i] / trials == pytest.approx(p, abs=5 * math.sqrt(p / trials) + 1e-12)


def test_more_draws_than_values_are_refused() -> None:
    with pytest.raises(ValueError, match="3 different draws from 2 possible values"):
        draw_several((1, "x"), (0.5, 0.5, 0.0), 3)
