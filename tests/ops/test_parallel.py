"""A vocabulary cut over ranks gives the losses and gradients of the whole one; parts make up a sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gloo_ranks import GROUPS, Members, Ranks, distil, judge, shares, summed, untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elastic_megatron.errors import UserError
from elastic_megatron.ops import distillation_loss, scale_gradient, token_cross_entropy, zigzag, zigzag_order

# relative to the spread of the logits: a float's last digit grows with the log-probabilities
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
TOKENS = st.sampled_from([(), (1,), (5,), (1, 1), (1, 7), (3, 5), (2, 1, 3)])
HOW = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["forward_kl", "reverse_kl", "cross_entropy"]),
        "temperature": st.sampled_from([1.0, 0.3, 1.7, 4.0]),
        "ce_weight": st.sampled_from([0.0, 0.3, 1.0]),
    }
)
BY_GROUP = pytest.mark.parametrize("members", GROUPS, ids=str)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


def logits_of(seed: int, tokens: tuple[int, ...], vocab: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*tokens, vocab, generator=generator, dtype=torch.float64)


def labels_of(seed: int, tokens: tuple[int, ...], vocab: int) -> Tensor:
    return torch.randint(0, vocab, tokens, generator=torch.Generator().manual_seed(seed))


def assert_cut_is_whole(
    ranks: Ranks, members: Members, student: Tensor, teacher: Tensor | None, labels: Tensor, **how: Any
) -> None:
    """Loss, divergence and gradient, for an upstream gradient that differs by token."""
    weight = torch.linspace(-1.0, 2.0, max(labels.numel(), 1), dtype=student.dtype).view(labels.shape)
    found = ranks.on(members, distil, student, teacher, labels, weight, **how)
    whole = student.clone().requires_grad_()
    loss, kd = distillation_loss(whole, teacher, labels, **how)
    (grad,) = torch.autograd.grad((weight * loss).sum(), whole)

    both = student if teacher is None else torch.stack((student, teacher))
    both = both[both > -1e29]
    spread = float(both.max() - both.min()) / min(how["temperature"], 1.0)
    close = dict(rtol=TOLERANCE[student.dtype], atol=TOLERANCE[student.dtype] * (1 + spread))
    for my_loss, my_kd, _ in found:
        assert torch.equal(my_loss, found[0][0]), "the ranks differ"
        torch.testing.assert_close(my_loss, loss, **close)
        assert (my_kd is None) == (kd is None)
        if kd is not None:
            assert torch.equal(my_kd, found[0][1]), "the ranks differ"
            torch.testing.assert_close(my_kd, kd, **close)
    torch.testing.assert_close(torch.cat([mine for *_, mine in found], -1), grad, **close)


@settings(max_examples=150)
@given(
    st.sampled_from(GROUPS),
    st.integers(0, 10**6),
    TOKENS,
    st.integers(1, 7),
    st.sampled_from([0.01, 1.0, 10.0, 1e3]),
    st.sampled_from(list(TOLERANCE)),
    HOW,
)
def test_a_cut_vocabulary_has_the_losses_and_gradients_of_the_whole(
    ranks: Ranks,
    members: Members,
    seed: int,
    tokens: tuple[int, ...],
    part: int,
    scale: float,
    dtype: torch.dtype,
    how: dict[str, Any],
) -> None:
    vocab = part * len(members)
    student, teacher = (logits_of(s, tokens, vocab, scale).to(dtype) for s in (seed, seed + 1))
    assert_cut_is_whole(ranks, members, student, teacher, labels_of(seed, tokens, vocab), **how)


@settings(max_examples=60)
@given(
    st.sampled_from(GROUPS),
    st.integers(0, 10**6),
    st.sampled_from([-60.0, -1e4, -1e30]),
    st.sampled_from(["entry", "part"]),
    st.sampled_from(list(TOLERANCE)),
    HOW,
)
def test_parts_far_below_the_others_change_nothing(
    ranks: Ranks,
    members: Members,
    seed: int,
    low: float,
    where: str,
    dtype: torch.dtype,
    how: dict[str, Any],
) -> None:
    """One entry, or all that some rank holds: its own maximum is then of no use to the row."""
    tokens, part = (2, 3), 5
    vocab = part * len(members)
    start = seed % vocab if where == "entry" else seed % len(members) * part
    lowered = slice(start, start + (1 if where == "entry" else part))
    student, teacher = (logits_of(s, tokens, vocab).to(dtype) for s in (seed, seed + 1))
    for logits in (student, teacher):
        logits[..., lowered] += low
    labels = labels_of(seed, tokens, vocab)
    labels[(labels >= lowered.start) & (labels < lowered.stop)] = lowered.stop % vocab
    assert_cut_is_whole(ranks, members, student, teacher, labels, **how)


@BY_GROUP
def test_without_a_teacher_a_cut_vocabulary_has_the_cross_entropy_of_the_whole(
    ranks: Ranks, members: Members
) -> None:
    vocab = 5 * len(members)
    student, labels = logits_of(1, (2, 3), vocab), labels_of(1, (2, 3), vocab)
    how = dict(kind="forward_kl", temperature=2.0, ce_weight=0.3)
    assert_cut_is_whole(ranks, members, student, None, labels, **how)


@BY_GROUP
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equal_logits_have_divergence_exactly_zero_on_every_rank(
    ranks: Ranks, members: Members, kind: str, dtype: torch.dtype
) -> None:
    vocab = 5 * len(members)
    logits, labels = logits_of(3, (3, 7), vocab).to(dtype), labels_of(3, (3, 7), vocab)
    how = dict(kind=kind, temperature=1.7, ce_weight=0.0)
    for loss, kd, _ in ranks.on(members, distil, logits, logits.clone(), labels, torch.ones(3, 7), **how):
        assert loss.dtype is kd.dtype is torch.float32 and not loss.any() and not kd.any()


@BY_GROUP
def test_logits_may_lie_in_memory_in_any_order(ranks: Ranks, members: Members) -> None:
    """Megatron's come as [sequence, batch, vocabulary] and are looked at as [batch, sequence, vocabulary]."""
    vocab = 3 * len(members)
    student, teacher = (logits_of(s, (5, 2), vocab).transpose(0, 1) for s in (1, 2))
    how = dict(kind="reverse_kl", temperature=1.7, ce_weight=0.3)
    assert_cut_is_whole(ranks, members, student, teacher, labels_of(1, (2, 5), vocab), **how)


@BY_GROUP
@pytest.mark.parametrize("tokens", [(), (1, 1), (3, 5)], ids=str)
def test_token_cross_entropy_is_torchs(ranks: Ranks, members: Members, tokens: tuple[int, ...]) -> None:
    vocab = 5 * len(members)
    logits, labels = logits_of(5, tokens, vocab), labels_of(5, tokens, vocab)
    expected = torch.nn.functional.cross_entropy(logits.view(-1, vocab), labels.view(-1), reduction="none")
    for found in (token_cross_entropy(logits, labels), *ranks.on(members, judge, logits, labels)):
        torch.testing.assert_close(found, expected.view(tokens), rtol=1e-12, atol=1e-12)


@BY_GROUP
@pytest.mark.parametrize("wrong", [-1, -100, 0], ids=["-1", "-100", "one past the end"])
def test_ids_outside_the_vocabulary_are_refused_by_every_rank_as_by_one(
    ranks: Ranks, members: Members, wrong: int
) -> None:
    logits = logits_of(1, (2,), 4 * len(members))
    labels = torch.tensor([1, wrong or 4 * len(members)])
    with pytest.raises(RuntimeError, match="out of bounds"):
        token_cross_entropy(logits, labels)
    with pytest.raises(RuntimeError) as error:
        ranks.on(members, judge, logits, labels)
    assert str(error.value).count("out of bounds") == len(members)


@BY_GROUP
def test_a_sum_over_ranks_has_the_gradient_of_each_part(ranks: Ranks, members: Members) -> None:
    parts = [logits_of(s, (3,), 5) for s in range(len(members))]
    inputs = [p.clone().requires_grad_() for p in parts]
    total = torch.stack(inputs).sum(0)
    grads = torch.autograd.grad(total.square().sum(), inputs)
    for (mine, my_grad), expected in zip(ranks.on(members, summed, parts), grads, strict=True):
        torch.testing.assert_close(mine, total.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(my_grad, expected, rtol=1e-12, atol=1e-12)


@BY_GROUP
def test_a_sum_over_ranks_leaves_its_terms_as_they_were(ranks: Ranks, members: Members) -> None:
    assert all(ranks.on(members, untouched, logits_of(1, (3,), 5)))


@BY_GROUP
def test_scaled_gradients_of_shared_work_add_up_to_the_gradient(ranks: Ranks, members: Members) -> None:
    x = logits_of(1, (3,), 5)
    for found in ranks.on(members, shares, x):
        torch.testing.assert_close(found, x.exp(), rtol=1e-12, atol=1e-12)


@given(st.integers(-40, 40).map(lambda i: i / 8))
def test_a_scaled_gradient_leaves_the_value_alone(factor: float) -> None:
    x = logits_of(1, (3,), 5).requires_grad_()
    y = scale_gradient(x, factor)
    assert torch.equal(y, x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(grad, factor * 2 * x.detach(), rtol=1e-12, atol=1e-12)


@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([0, 1, 2, -1]))
def test_zigzag_parts_make_up_the_sequence(size: int, chunk: int, dim: int) -> None:
    shape = [3, 1, 2]
    shape[dim] = length = 2 * size * chunk
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = [zigzag(whole, dim, rank, size) for rank in range(size)]
    assert {part.shape[dim] for part in parts} == {2 * chunk}
    order = zigzag_order(length, size)
    assert order.sort().values.equal(torch.arange(length))
    assert (order.view(size, 2 * chunk).diff(dim=1) > 0).all(), "a part is not in the sequence's order"
    joined = torch.cat(parts, dim)
    assert joined.equal(whole.index_select(dim, order))
    restored = torch.empty_like(whole).index_copy_(dim, order, joined)
    assert restored.equal(whole)


@given(st.integers(1, 6), st.integers(1, 4))
def test_zigzag_parts_do_equal_work_under_a_causal_mask(size: int, chunk: int) -> None:
    """A position's work is the number of positions that it sees."""
    work = torch.arange(2 * size * chunk) + 1
    assert len({int(zigzag(work, 0, rank, size).sum()) for rank in range(size)}) == 1


@pytest.mark.parametrize(("length", "size"), [(6, 2), (2, 2), (7, 2), (9, 3)])
def test_sequences_that_do_not_divide_are_refused(length: int, size: int) -> None:
    with pytest.raises(UserError, match=f"{length} does not divide .* multiple of {2 * size}"):
        zigzag(torch.zeros(length), 0, 0, size)
    with pytest.raises(UserError):
        zigzag_order(length, size)


def test_one_rank_holds_any_sequence_whole() -> None:
    x = torch.arange(7)
    assert zigzag(x, 0, 0, 1) is x and zigzag_order(7, 1).equal(x)


@pytest.mark.parametrize("size", [2, 3])
def test_zigzag_is_megatrons(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("megatron.core.utils")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: size)
    whole = torch.arange(2 * 6 * size).view(2, 6 * size)
    for rank in range(size):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        theirs = utils.get_batch_on_this_cp_rank(
            {"tokens": whole.clone()}, is_hybrid_cp=False, cp_group=object()
        )
        assert zigzag(whole, 1, rank, size).equal(theirs["tokens"])
