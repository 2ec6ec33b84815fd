"""A vocabulary cut over ranks, chunk by chunk: losses and gradients of whole logits, for two messages a chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gloo_ranks import GROUPS, Members, Ranks, distil_in_chunks
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_megatron.ops import Projection, distillation_loss

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


def model(seed: int, tokens: int, vocabulary: int, channels: int, scale: float) -> Projection:
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, channels, generator=g, dtype=torch.float64)
    return Projection(hidden, torch.randn(vocabulary, channels, generator=g, dtype=torch.float64))


@settings(max_examples=120)
@given(
    st.sampled_from(GROUPS),
    st.integers(0, 10**6),
    st.integers(1, 7),
    st.integers(1, 7),
    st.sampled_from([1, 2, 3, 100]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.01, 1.0, 10.0, 300.0]),
    st.sampled_from(list(TOLERANCE)),
    st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["forward_kl", "reverse_kl", "cross_entropy"]),
            "temperature": st.sampled_from([1.0, 0.3, 1.7]),
            "ce_weight": st.sampled_from([0.0, 0.3, 1.0]),
        }
    ),
)
def test_parts_of_the_vocabulary_give_the_sums_and_gradients_of_whole_logits(
    ranks: Ranks,
    members: Members,
    seed: int,
    tokens: int,
    part: int,
    chunk: int,
    recompute: bool,
    taught: bool,
    scale: float,
    dtype: torch.dtype,
    how: dict[str, Any],
) -> None:
    vocabulary = part * len(members)
    s, t = (model(seed + i, tokens, vocabulary, 4 + i, scale) for i in range(2))
    s, t = (Projection(p.hidden.to(dtype), p.weight.to(dtype)) for p in (s, t))
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, (tokens,), generator=g)
    mask = torch.rand(tokens, generator=g, dtype=torch.float64).to(dtype)
    mask[: seed % 3] = 0.0

    teacher = t if taught else None
    found = ranks.on(
        members, distil_in_chunks, s, teacher, labels, mask, **how, chunk=chunk, recompute=recompute
    )
    whole = Projection(*(x.clone().requires_grad_() for x in (s.hidden, s.weight)))
    logits = [p.hidden @ p.weight.T for p in (whole, t)]
    losses, divergences = distillation_loss(logits[0], logits[1] if taught else None, labels, **how)
    expected = (losses * mask).sum()
    of_hidden, of_weight = torch.autograd.grad(expected, (whole.hidden, whole.weight))

    largest = max(float(x.detach().abs().max()) for x in logits) / min(how["temperature"], 1.0)
    tolerance = TOLERANCE[dtype] * (1 + largest) * (float(mask.sum()) + 1e-30)
    close = dict(rtol=TOLERANCE[dtype], atol=tolerance)
    for loss, kd, *_ in found:
        assert torch.equal(loss, found[0][0]), "the ranks differ"
        torch.testing.assert_close(loss, expected.detach(), **close)
        assert (kd is None) == (divergences is None)
        if kd is not None and divergences is not None:
            torch.testing.assert_close(kd, (divergences * mask).sum().detach(), **close)
    # every rank gives its part's share of the gradient of hidden states, and its rows of the weight's
    shared = torch.stack([mine[2] for mine in found]).sum(0)
    rows = torch.cat([mine[3] for mine in found])
    for mine, theirs, other in ((shared, of_hidden, s.weight), (rows, of_weight, s.hidden)):
        atol = tolerance * float(other.abs().max()) / min(how["temperature"], 1.0)
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE[dtype], atol=atol)
    chunks = -(-tokens // chunk)
    assert {mine[4] for mine in found} == {2 * chunks * (2 if recompute else 1)}


@pytest.mark.parametrize("members", GROUPS, ids=str)
@pytest.mark.parametrize("wrong", [-1, 0], ids=["-1", "one past the end"])
def test_ids_outside_the_vocabulary_are_refused_by_every_rank(
    ranks: Ranks, members: Members, wrong: int
) -> None:
    s = model(1, 2, 4 * len(members), 3, 1.0)
    labels = torch.tensor([1, wrong or 4 * len(members)])
    how = {"kind": "cross_entropy", "temperature": 1.0, "ce_weight": 0.0}
    with pytest.raises(RuntimeError) as error:
        ranks.on(members, distil_in_chunks, s, None, labels, torch.ones(2), **how)
    assert str(error.value).count("out of bounds") == len(members)
