"""Losses from hidden states, chunk by chunk, are the dense ones on whole logits; so are their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elastic_megatron.ops import (
    Projection,
    chunked_distillation_loss,
    chunked_token_losses,
    distillation_loss,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
HOW = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["forward_kl", "reverse_kl", "cross_entropy"]),
        "temperature": st.sampled_from([1.0, 0.3, 1.7, 4.0]),
        "ce_weight": st.sampled_from([0.0, 0.3, 1.0]),
    }
)
PLAIN: dict[str, Any] = {"kind": "forward_kl", "temperature": 1.0, "ce_weight": 0.0}
EVERY_KIND = pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "cross_entropy"])


def model(seed: int, tokens: int, vocabulary: int, channels: int, scale: float = 1.0) -> Projection:
    g = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, channels, generator=g, dtype=torch.float64)
    return Projection(hidden, torch.randn(vocabulary, channels, generator=g, dtype=torch.float64))


def texts(seed: int, tokens: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Labels, and weights of tokens of which some are zero, a whole chunk's among them."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocabulary, (tokens,), generator=g)
    mask = torch.rand(tokens, generator=g, dtype=torch.float64)
    mask[mask < 0.3] = 0.0
    mask[: seed % 5] = 0.0
    return labels, mask


def typed(p: Projection, dtype: torch.dtype, *, learns: bool = True) -> Projection:
    return Projection(*(t.to(dtype).requires_grad_(learns) for t in (p.hidden, p.weight)))


def dense(s: Projection, t: Projection | None, labels: Tensor, mask: Tensor, **how: Any) -> Any:
    logits, theirs = (None if p is None else p.hidden @ p.weight.T for p in (s, t))
    assert logits is not None
    loss, kd = distillation_loss(logits, theirs, labels, **how)
    return (loss * mask).sum(), None if kd is None else (kd * mask).sum().detach()


def spread(*models: Projection) -> float:
    """Largest logit: a float's last digit grows with it."""
    return max(float((p.hidden @ p.weight.T).abs().max()) for p in models)


@settings(max_examples=250)
@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 40),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.sampled_from([1, 2, 3, 4, 8, 100, None]),
    st.booleans(),
    st.sampled_from([0.01, 1.0, 10.0, 300.0]),
    st.sampled_from([1.0, -0.7, 3.5]),
    st.sampled_from(list(TOLERANCE)),
    HOW,
)
def test_chunks_have_the_losses_and_gradients_of_whole_logits(
    seed: int,
    tokens: int,
    vocabulary: int,
    channels: tuple[int, int],
    chunk: int | None,
    recompute: bool,
    scale: float,
    upstream: float,
    dtype: torch.dtype,
    how: dict[str, Any],
) -> None:
    s, t = (model(seed + i, tokens, vocabulary, c, scale) for i, c in enumerate(channels))
    labels, mask = texts(seed, tokens, vocabulary)
    s, t, mask = typed(s, dtype), typed(t, dtype, learns=False), mask.to(dtype)
    expected, expected_kd = dense(s, t, labels, mask, **how)
    loss, kd = chunked_distillation_loss(s, t, labels, mask, **how, chunk=chunk, recompute=recompute)
    grads = torch.autograd.grad(upstream * loss, (s.hidden, s.weight))
    expected_grads = torch.autograd.grad(upstream * expected, (s.hidden, s.weight))

    tolerance = TOLERANCE[dtype] * (1 + spread(s, t) / min(how["temperature"], 1.0))
    weight = float(mask.sum()) + 1e-30
    close = dict(rtol=TOLERANCE[dtype], atol=tolerance * weight)
    torch.testing.assert_close(loss, expected, **close)
    assert (kd is None) == (expected_kd is None)
    if kd is not None:
        torch.testing.assert_close(kd, expected_kd, **close)
    for found, wanted, other in zip(grads, expected_grads, (s.weight, s.hidden), strict=True):
        # of the products that a gradient is the sum of, the largest counts
        largest = abs(upstream) * weight * float(other.abs().max()) / min(how["temperature"], 1.0)
        torch.testing.assert_close(found, wanted, rtol=TOLERANCE[dtype], atol=tolerance * largest)


@EVERY_KIND
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
@pytest.mark.parametrize("recompute", [False, True])
def test_fp32_is_within_a_millionth_of_dense_fp64(
    kind: str, temperature: float, ce_weight: float, recompute: bool
) -> None:
    """Logits of ordinary size, a few thousand entries, a last chunk that is not full."""
    how: dict[str, Any] = {"kind": kind, "temperature": temperature, "ce_weight": ce_weight}
    s, t = (model(i, 50, 3001, 24, 0.5) for i in (1, 2))
    s, t = (Projection(p.hidden.float().double(), p.weight.float().double()) for p in (s, t))
    labels, mask = texts(1, 50, 3001)
    exact = typed(s, torch.float64)
    expected, _ = dense(exact, t, labels, mask.float().double(), **how)
    wanted = torch.autograd.grad(expected, (exact.hidden, exact.weight))
    s, t = typed(s, torch.float32), typed(t, torch.float32)
    loss, _ = chunked_distillation_loss(s, t, labels, mask.float(), **how, chunk=16, recompute=recompute)
    found = torch.autograd.grad(loss, (s.hidden, s.weight))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for mine, theirs in zip(found, wanted, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-6


@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from([1, 3, 5, 100]), HOW)
def test_losses_of_tokens_are_the_dense_ones(seed: int, tokens: int, chunk: int, how: dict[str, Any]) -> None:
    s, t = (model(seed + i, 2 * tokens, 23, 4) for i in range(2))
    labels, _ = texts(seed, 2 * tokens, 23)
    expected = distillation_loss(s.hidden @ s.weight.T, t.hidden @ t.weight.T, labels, **how)
    s, t = (Projection(p.hidden.view(2, tokens, -1), p.weight) for p in (s, t))
    found = chunked_token_losses(s, t, labels.view(2, tokens), **how, chunk=chunk)
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs.view(2, tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_student_that_is_its_teacher_has_divergence_exactly_zero(
    kind: str, temperature: float, dtype: torch.dtype
) -> None:
    s = typed(model(3, 7, 33, 6), dtype)
    labels, mask = texts(3, 7, 33)
    how: dict[str, Any] = {"kind": kind, "temperature": temperature, "ce_weight": 0.0}
    loss, kd = chunked_distillation_loss(s, typed(s, dtype), labels, mask.float(), **how, chunk=3)
    assert loss.dtype is torch.float32 and not loss and not kd


@EVERY_KIND
@pytest.mark.parametrize("recompute", [False, True])
def test_masked_tokens_weigh_nothing(kind: str, recompute: bool) -> None:
    """Also where they fill chunks, and where nothing else is left."""
    s, t = typed(model(1, 9, 21, 4), torch.float64), model(2, 9, 21, 5)
    labels, _ = texts(1, 9, 21)
    how = PLAIN | {"kind": kind, "ce_weight": 0.3}
    for kept in (slice(3, 5), slice(0, 0)):
        mask = torch.zeros(9, dtype=torch.float64)
        mask[kept] = 1.0
        loss, _ = chunked_distillation_loss(s, t, labels, mask, **how, chunk=2, recompute=recompute)
        of_hidden, of_weight = torch.autograd.grad(loss, (s.hidden, s.weight))
        assert not of_hidden[mask == 0].any()
        alone, theirs = (Projection(p.hidden[kept], p.weight) for p in (s, t))
        expected, _ = dense(alone, theirs, labels[kept], mask[kept], **how)
        (wanted,) = torch.autograd.grad(expected, s.weight)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(of_weight, wanted, rtol=1e-12, atol=1e-12)


@EVERY_KIND
def test_without_a_teacher_it_is_the_cross_entropy_whatever_the_temperature(kind: str) -> None:
    s = typed(model(1, 5, 21, 4), torch.float64)
    labels, mask = texts(1, 5, 21)
    how = {"kind": kind, "temperature": 2.0, "ce_weight": 0.3}
    loss, kd = chunked_distillation_loss(s, None, labels, mask, **how, chunk=2)
    logits = s.hidden @ s.weight.T
    expected = (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * mask).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert kd is None


@EVERY_KIND
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("learns", [(True, False), (False, True), (False, False)], ids=str)
def test_what_is_frozen_gets_no_gradient_and_costs_none(
    kind: str, recompute: bool, learns: tuple[bool, bool]
) -> None:
    how = PLAIN | {"kind": kind}
    s, t = typed(model(1, 5, 21, 4), torch.float64), typed(model(2, 5, 21, 4), torch.float64)
    labels, mask = texts(1, 5, 21)
    both, _ = chunked_distillation_loss(s, t, labels, mask, **how, chunk=2)
    wanted = torch.autograd.grad(both, (s.hidden, s.weight))
    parts = [x.detach().requires_grad_(grows) for x, grows in zip((s.hidden, s.weight), learns, strict=True)]
    loss, kd = chunked_distillation_loss(
        Projection(*parts), t, labels, mask, **how, chunk=2, recompute=recompute
    )
    assert loss.requires_grad == any(learns) and (kd is None or not kd.requires_grad)
    if any(learns):
        loss.backward()
    for part, grows, grad in zip(parts, learns, wanted, strict=True):
        assert part.grad is None if not grows else torch.equal(part.grad, grad)
    assert t.hidden.grad is t.weight.grad is None


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that an operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@EVERY_KIND
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_no_tensor_is_larger_than_a_chunk_of_logits(
    kind: str, recompute: bool, dtype: torch.dtype, temperature: float
) -> None:
    s, t = typed(model(1, 64, 101, 3), dtype), typed(model(2, 64, 101, 4), dtype)
    labels, mask = texts(1, 64, 101)
    how = {"kind": kind, "temperature": temperature, "ce_weight": 0.3}
    with Largest() as seen:
        loss, _ = chunked_distillation_loss(s, t, labels, mask.float(), **how, chunk=8, recompute=recompute)
        loss.backward()
    assert seen.numel == 8 * 101


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_a_bf16_weight_are_added_up_in_fp32(recompute: bool) -> None:
    """A thousand equal terms: in bf16 the sum would stop growing at 256 of them."""
    tokens = 1000
    hidden = torch.ones(tokens, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.long)
    how = PLAIN | {"kind": "cross_entropy"}
    loss, _ = chunked_distillation_loss(
        Projection(hidden, weight), None, labels, torch.ones(tokens), **how, chunk=1, recompute=recompute
    )
    loss.backward()
    assert weight.grad is not None and weight.grad.dtype is torch.bfloat16
    assert weight.grad.flatten().tolist() == [-500.0, 500.0]


@EVERY_KIND
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_bf16_is_as_near_to_fp64_as_dense_bf16(kind: str, temperature: float, ce_weight: float) -> None:
    how = {"kind": kind, "temperature": temperature, "ce_weight": ce_weight}
    s, t = (typed(model(i, 40, 301, 16, 0.5), torch.bfloat16) for i in (1, 2))
    labels, mask = texts(1, 40, 301)
    exact, theirs = (typed(Projection(p.hidden.detach(), p.weight.detach()), torch.float64) for p in (s, t))
    expected, _ = dense(exact, theirs, labels, mask, **how)
    wanted = torch.autograd.grad(expected, (exact.hidden, exact.weight))

    def errors(loss: Tensor) -> list[float]:
        found = torch.autograd.grad(loss, (s.hidden, s.weight))
        return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]

    loss, _ = chunked_distillation_loss(s, t, labels, mask.float(), **how, chunk=7)
    whole, _ = dense(s, t, labels, mask.float(), **how)
    assert abs(loss - expected) <= 1.1 * abs(whole - expected) + 1e-5 * abs(expected)
    for mine, densely in zip(errors(loss), errors(whole), strict=True):
        assert mine <= 1.2 * densely


def test_hidden_states_and_weights_may_be_views() -> None:
    """As Megatron's [s, b, channels] looked at as [b, s, channels], and a narrower model's part of a weight."""
    base, labels = model(1, 12, 21, 9), texts(1, 12, 21)[0].view(3, 4)
    hidden = base.hidden.view(4, 3, 9).transpose(0, 1)[..., :5].requires_grad_()
    weight = base.weight[:, :5].requires_grad_()
    mask = torch.ones(3, 4, dtype=torch.float64)
    t = Projection(model(2, 12, 21, 4).hidden.view(3, 4, 4), model(2, 12, 21, 4).weight)
    expected, _ = dense(Projection(hidden, weight), t, labels, mask, **PLAIN)
    loss, _ = chunked_distillation_loss(Projection(hidden, weight), t, labels, mask, **PLAIN, chunk=5)
    pairs = zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, expected)), strict=True)
    for mine, theirs in [(loss, expected), *pairs]:
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrong", [-1, -100, 21])
def test_ids_outside_the_vocabulary_are_refused(wrong: int) -> None:
    s, labels = model(1, 2, 21, 3), torch.tensor([1, wrong])
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_token_losses(s, None, labels, **PLAIN)


def test_gradients_are_handed_out_once_and_recomputed_as_often_as_asked() -> None:
    s, t = typed(model(1, 5, 21, 4), torch.float64), model(2, 5, 21, 4)
    labels, mask = texts(1, 5, 21)
    once, again = (
        chunked_distillation_loss(s, t, labels, mask, **PLAIN, recompute=recompute)[0]
        for recompute in (False, True)
    )
    first = torch.autograd.grad(once, s.hidden, retain_graph=True)
    with pytest.raises(AssertionError, match="recompute"):
        torch.autograd.grad(once, s.hidden)
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(again, s.hidden, retain_graph=True)[0], first[0])


def test_a_kind_that_there_is_not_is_refused() -> None:
    s, (labels, mask) = model(1, 5, 21, 4), texts(1, 5, 21)
    with pytest.raises(ValueError, match="sideways"):
        chunked_distillation_loss(s, s, labels, mask, **PLAIN | {"kind": "sideways"})
