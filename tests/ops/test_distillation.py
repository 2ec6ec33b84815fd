"""Distillation losses against torch's own, and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic_megatron.ops import distillation_loss


def case(seed: int, rows: int = 3, vocab: int = 17, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale * torch.randn(2, rows, vocab, generator=g, dtype=torch.float64) for _ in range(2)
    )
    return student.requires_grad_(), teacher, torch.randint(0, vocab, (2, rows), generator=g)


def truth(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    q, p = (F.log_softmax(t / temperature, -1) for t in (student, teacher))
    a, b = (q, p) if kind == "forward_kl" else (p, q)
    return F.kl_div(a, b, reduction="none", log_target=True).sum(-1)


@given(
    st.integers(0, 10**6),
    st.sampled_from(["forward_kl", "reverse_kl"]),
    st.integers(5, 80).map(lambda i: i / 20),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_losses_and_gradients_are_torchs(seed: int, kind: str, temperature: float, ce_weight: float) -> None:
    student, teacher, labels = case(seed)
    loss, kd = distillation_loss(
        student, teacher, labels, kind=kind, temperature=temperature, ce_weight=ce_weight
    )
    expected_kd = truth(student, teacher, kind, temperature)
    ce = F.cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    expected = (1 - ce_weight) * expected_kd + ce_weight * ce
    assert torch.allclose(kd, expected_kd, rtol=1e-9, atol=1e-12)
    assert torch.allclose(loss, expected, rtol=1e-9, atol=1e-12)
    (mine,), (theirs,) = (torch.autograd.grad(x.sum(), student) for x in (loss, expected))
    assert torch.allclose(mine, theirs, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_equal_logits_have_divergence_exactly_zero(kind: str, temperature: float, dtype: torch.dtype) -> None:
    student, _, labels = case(1)
    logits = student.detach().to(dtype)
    loss, kd = distillation_loss(
        logits, logits.clone(), labels, kind=kind, temperature=temperature, ce_weight=0.0
    )
    assert not kd.any() and not loss.any()


@given(st.integers(0, 10**6), st.sampled_from(["forward_kl", "reverse_kl"]))
def test_divergence_is_never_negative_and_ignores_a_shift(seed: int, kind: str) -> None:
    student, teacher, labels = case(seed)
    settings = dict(kind=kind, temperature=1.0, ce_weight=0.0)
    _, kd = distillation_loss(student, teacher, labels, **settings)
    _, shifted = distillation_loss(student + 7, teacher - 3, labels, **settings)
    assert (kd > 0).all() and torch.allclose(kd, shifted)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher, labels = case(2)
    teacher.requires_grad_()
    loss, _ = distillation_loss(student, teacher, labels, kind="forward_kl", temperature=1.0, ce_weight=0.5)
    loss.sum().backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("with_teacher", [True, False])
def test_cross_entropy_ignores_the_teacher(with_teacher: bool) -> None:
    student, teacher, labels = case(3)
    loss, kd = distillation_loss(
        student,
        teacher if with_teacher else None,
        labels,
        kind="cross_entropy",
        temperature=2.0,
        ce_weight=0.0,
    )
    expected = F.cross_entropy(student.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    assert kd is None and torch.allclose(loss, expected)


def test_sharp_logits_stay_finite_with_finite_gradients() -> None:
    student = torch.tensor([[[60.0, -60.0, 0.0]]], requires_grad=True)
    loss, _ = distillation_loss(
        student, -student.detach(), torch.tensor([[1]]), kind="forward_kl", temperature=0.5, ce_weight=0.1
    )
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad is not None and student.grad.isfinite().all()


def test_losses_of_bf16_logits_are_fp32() -> None:
    student, teacher, labels = case(4)
    loss, kd = distillation_loss(
        student.bfloat16(), teacher.bfloat16(), labels, kind="forward_kl", temperature=1.0, ce_weight=0.5
    )
    assert loss.dtype is torch.float32 and kd is not None and kd.dtype is torch.float32
