"""Distillation from the top entries of a teacher is that between distributions over k + 1 outcomes, and misses only
what it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gloo_ranks import GROUPS, Members, Ranks, distil_in_chunks, top_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elastic_megatron.ops import (
    Projection,
    TopLogits,
    chunked_distillation_loss,
    chunked_token_losses,
    distillation_loss,
    top_logits,
)

HOW = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["forward_kl", "reverse_kl"]),
        "temperature": st.sampled_from([1.0, 0.3, 1.7, 4.0]),
        "ce_weight": st.sampled_from([0.0, 0.3, 1.0]),
    }
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
PLAIN: dict[str, Any] = {"kind": "forward_kl", "temperature": 1.0, "ce_weight": 0.0}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


def model(
    seed: int, tokens: int, vocabulary: int, channels: int, scale: float = 1.0, dtype: Any = torch.float64
) -> Projection:
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, channels, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, channels, generator=g, dtype=torch.float64)
    return Projection(hidden.to(dtype), weight.to(dtype))


def texts(seed: int, tokens: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, (tokens,), generator=g)
    mask = torch.rand(tokens, generator=g, dtype=torch.float64)
    mask[mask < 0.3] = 0.0
    return labels, mask


def logits_of(p: Projection, temperature: float = 1.0) -> Tensor:
    return p.hidden @ p.weight.T / temperature


def outcomes(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the entries and of all others together, slowly."""
    log_q = logits.log_softmax(-1)
    others = torch.ones_like(log_q, dtype=torch.bool).scatter(-1, ids, False)
    rest = log_q.masked_fill(~others, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_q.gather(-1, ids), rest], -1)


def slow(
    student: Projection, top: TopLogits, labels: Tensor, *, kind: str, temperature: float, ce_weight: float
) -> tuple[Tensor, Tensor]:
    """Loss and divergence of every token, from whole logits."""
    log_q, log_p = outcomes(logits_of(student, temperature), top.ids), top.log_p
    if log_p[..., -1].isneginf().all():
        log_q, log_p = log_q[..., :-1], log_p[..., :-1]
    ahead, behind = (log_p, log_q) if kind == "forward_kl" else (log_q, log_p)
    kd = (ahead.exp() * (ahead - behind)).sum(-1)
    ce = torch.nn.functional.cross_entropy(logits_of(student), labels, reduction="none")
    return (1 - ce_weight) * kd + ce_weight * ce, kd


def learning(p: Projection) -> Projection:
    return Projection(p.hidden.clone().requires_grad_(), p.weight.clone().requires_grad_())


@given(st.integers(0, 10**6), st.integers(1, 7), st.integers(1, 20), st.data())
def test_top_entries_are_the_largest_and_probabilities_sum_to_one(
    seed: int, tokens: int, vocabulary: int, data: st.DataObject
) -> None:
    k, chunk = data.draw(st.integers(1, vocabulary)), data.draw(st.sampled_from([1, 3, None]))
    teacher = model(seed, tokens, vocabulary, 4)
    found = top_logits(teacher, k, temperature=1.7, chunk=chunk)
    log_p = logits_of(teacher, 1.7).log_softmax(-1)
    wanted, ids = log_p.topk(k)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.log_p, outcomes(log_p, ids), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.log_p[:, :-1], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.log_p.exp().sum(-1), torch.ones(tokens, dtype=torch.float64))
    assert found.log_p[:, -1].isneginf().all() == (k == vocabulary)


@settings(max_examples=200)
@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 30),
    st.sampled_from([1, 2, 3, 8, None]),
    st.booleans(),
    st.sampled_from([0.01, 1.0, 10.0, 300.0]),
    st.sampled_from(list(TOLERANCE)),
    HOW,
    st.data(),
)
def test_chunks_have_the_losses_and_gradients_of_k_plus_one_outcomes(
    seed: int,
    tokens: int,
    vocabulary: int,
    chunk: int | None,
    recompute: bool,
    scale: float,
    dtype: torch.dtype,
    how: dict[str, Any],
    data: st.DataObject,
) -> None:
    k = data.draw(st.integers(1, vocabulary))
    student, teacher = (model(seed + i, tokens, vocabulary, 4 + i, scale, dtype) for i in range(2))
    labels, mask = texts(seed, tokens, vocabulary)
    mask = mask.to(dtype)
    top = top_logits(teacher, k, temperature=how["temperature"])
    s = learning(student)
    loss, kd = chunked_distillation_loss(s, top, labels, mask, **how, chunk=chunk, recompute=recompute)
    found = torch.autograd.grad(-0.7 * loss, (s.hidden, s.weight))
    s = learning(student)
    losses, divergences = slow(s, top, labels, **how)
    expected = (losses * mask).sum()
    wanted = torch.autograd.grad(-0.7 * expected, (s.hidden, s.weight))

    largest = max(float(logits_of(p).abs().max()) for p in (student, teacher)) / min(how["temperature"], 1.0)
    tolerance = TOLERANCE[dtype] * (1 + largest) * (float(mask.sum()) + 1e-30)
    close = dict(rtol=TOLERANCE[dtype], atol=tolerance)
    torch.testing.assert_close(loss, expected, **close)
    torch.testing.assert_close(kd, (divergences * mask).sum(), **close)
    for mine, theirs, other in zip(found, wanted, (student.weight, student.hidden), strict=True):
        atol = tolerance * (1 + largest) * float(other.abs().max()) / min(how["temperature"], 1.0)
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE[dtype], atol=atol)


@given(st.integers(0, 10**6), st.integers(2, 20), st.data(), st.sampled_from(["forward_kl", "reverse_kl"]))
def test_the_whole_divergence_exceeds_it_by_what_lies_between_the_others(
    seed: int, vocabulary: int, data: st.DataObject, kind: str
) -> None:
    """KL(p || q) = KL of the outcomes + p_rest KL(p given rest || q given rest), whose last term is not negative."""
    k = data.draw(st.integers(1, vocabulary - 1))
    student, teacher = (model(seed + i, 5, vocabulary, 4) for i in range(2))
    labels, _ = texts(seed, 5, vocabulary)
    how = PLAIN | {"kind": kind}
    top = top_logits(teacher, k)
    _, part = chunked_token_losses(student, top, labels, **how)
    _, whole = distillation_loss(logits_of(student), logits_of(teacher), labels, **how)
    others = torch.ones(5, vocabulary, dtype=torch.bool).scatter(-1, top.ids, False)
    log_q, log_p = (logits_of(m)[others].view(5, -1).log_softmax(-1) for m in (student, teacher))
    rest = top.log_p[:, -1].exp()
    if kind == "reverse_kl":
        log_p, log_q = log_q, log_p
        rest = outcomes(logits_of(student), top.ids)[:, -1].exp()
    between = rest * (log_p.exp() * (log_p - log_q)).sum(-1)
    assert part is not None and whole is not None and (between >= -1e-14).all()
    torch.testing.assert_close(whole, part + between, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(1, 20), HOW)
def test_with_all_entries_it_is_the_whole_divergence(seed: int, vocabulary: int, how: dict[str, Any]) -> None:
    student, teacher = (model(seed + i, 5, vocabulary, 4) for i in range(2))
    labels, mask = texts(seed, 5, vocabulary)
    top = top_logits(teacher, vocabulary, temperature=how["temperature"])
    results = []
    for reference in (top, teacher):
        s = learning(student)
        loss, kd = chunked_distillation_loss(s, reference, labels, mask, **how)
        results.append([loss, kd, *torch.autograd.grad(loss, (s.hidden, s.weight))])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_packing_moves_a_log_probability_by_less_than_a_two_thousandth_of_its_distance_to_the_first() -> None:
    for scale in (0.1, 1.0, 30.0):
        top = top_logits(model(1, 50, 4000, 16, scale, torch.float32), 64)
        ids, rest, below = top.packed()
        assert (ids.dtype, rest.dtype, below.dtype) == (torch.int32, torch.float32, torch.float16)
        again = TopLogits.unpacked(ids, rest, below)
        assert torch.equal(again.ids, top.ids)
        torch.testing.assert_close(again.log_p.exp().sum(-1), torch.ones(50))
        distance = top.log_p[:, :1] - top.log_p
        between = again.log_p[:, :1] - again.log_p  # normalising moves all of a row alike
        error = (between - distance).abs()[:, :-1]
        assert (error <= distance[:, :-1] * 2**-11 + 1e-4 * 2**-11 + 4e-6 * scale).all()
        assert float(error.max()) > 0
        if scale == 1.0:
            assert float((again.log_p - top.log_p)[:, 0].abs().max()) < 2e-3


def test_what_is_packed_again_is_the_same() -> None:
    """A row that was read back and packed once more would be the same row."""
    ids, rest, below = top_logits(model(1, 50, 400, 16, 1.0, torch.float32), 9).packed()
    again = TopLogits.unpacked(ids, rest, below).packed()
    assert torch.equal(again[0], ids) and torch.equal(again[2], below)
    torch.testing.assert_close(again[1], rest)


def test_packed_without_others_keeps_them_impossible() -> None:
    top = TopLogits.unpacked(*top_logits(model(1, 3, 7, 4), 7).packed())
    assert top.log_p[:, -1].isneginf().all()
    s = learning(model(2, 3, 7, 4, dtype=torch.float32))
    loss, _ = chunked_distillation_loss(s, top, torch.zeros(3, dtype=torch.long), torch.ones(3), **PLAIN)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (s.hidden, s.weight)))


@settings(max_examples=40)
@given(
    st.sampled_from(GROUPS),
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 7),
    st.booleans(),
    st.sampled_from([1.0, 300.0]),
    HOW,
    st.data(),
)
def test_parts_of_the_vocabulary_give_the_entries_losses_and_gradients_of_whole_logits(
    ranks: Ranks,
    members: Members,
    seed: int,
    tokens: int,
    part: int,
    recompute: bool,
    scale: float,
    how: dict[str, Any],
    data: st.DataObject,
) -> None:
    vocabulary = part * len(members)
    k = data.draw(st.integers(1, vocabulary))
    student, teacher = (model(seed + i, tokens, vocabulary, 4, scale) for i in range(2))
    labels, mask = texts(seed, tokens, vocabulary)
    temperature = how["temperature"]
    top = top_logits(teacher, k, temperature=temperature)
    for ids, log_p in ranks.on(members, top_of, teacher, k, temperature=temperature, chunk=2):
        assert torch.equal(ids, top.ids)
        torch.testing.assert_close(log_p, top.log_p, rtol=1e-12, atol=1e-12 * scale)

    found = ranks.on(
        members, distil_in_chunks, student, top, labels, mask, **how, chunk=2, recompute=recompute
    )
    s = learning(student)
    loss, _ = chunked_distillation_loss(s, top, labels, mask, **how)
    of_hidden, of_weight = torch.autograd.grad(loss, (s.hidden, s.weight))
    close = dict(rtol=1e-10, atol=1e-11 * scale)
    assert all(torch.equal(mine[0], found[0][0]) for mine in found), "the ranks differ"
    torch.testing.assert_close(found[0][0], loss.detach(), **close)
    torch.testing.assert_close(torch.stack([mine[2] for mine in found]).sum(0), of_hidden, **close)
    torch.testing.assert_close(torch.cat([mine[3] for mine in found]), of_weight, **close)
    assert {mine[4] for mine in found} == {2 * -(-tokens // 2) * (2 if recompute else 1)}
