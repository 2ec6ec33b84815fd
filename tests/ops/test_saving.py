"""A masked input is not kept for the backward pass beside the input and the mask that it is made of."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from elastic_megatron.ops.saving import recomputed


class _Counted(torch.autograd.Function):
    """``x @ w.T`` that keeps both, as grouped GEMMs keep a view of their input for each expert."""

    seen: ClassVar[list[Any]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, w = ctx.saved_tensors
        _Counted.seen.append(w)
        return grad @ w, grad.t() @ x


def masked_experts(x: Tensor, mask: Tensor, weights: list[nn.Parameter], *, recompute: bool) -> Tensor:
    product = x * mask
    parts = product.split(len(x) // len(weights))
    out = torch.cat([_Counted.apply(p, w) for p, w in zip(parts, weights, strict=True)])
    if recompute:
        assert out.grad_fn is not None
        recomputed(product, x, mask, before=out.grad_fn)
        assert product.untyped_storage().nbytes() == 0
    return out


@pytest.mark.parametrize("experts", [1, 2, 7])
def test_gradients_are_those_of_a_product_that_was_kept(
    monkeypatch: pytest.MonkeyPatch, experts: int
) -> None:
    """Bit for bit, with one multiplication per backward pass, however many nodes keep a view of the product."""
    made = []
    multiply = torch.mul
    monkeypatch.setattr(torch, "mul", lambda *a, **k: made.append(a) or multiply(*a, **k))
    x, mask = torch.randn(3 * experts, 5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    mask[2] = 0.0
    weights = [nn.Parameter(torch.randn(4, 5, dtype=torch.float64)) for _ in range(experts)]

    def gradients(recompute: bool) -> list[Tensor]:
        leaf, factor = x.clone().requires_grad_(), mask.clone().requires_grad_()
        total = masked_experts(leaf, factor, weights, recompute=recompute).pow(2).sum()
        wanted = [leaf, factor, *weights]
        return [g for _ in range(2) for g in torch.autograd.grad(total, wanted, retain_graph=True)]

    kept = gradients(False)
    assert not made
    for found, expected in zip(gradients(True), kept, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(made) == 2


def test_parameters_are_saved_as_themselves() -> None:
    """Fused weight gradients are marked on the parameter, by whoever computes them in the backward pass."""
    _Counted.seen.clear()
    x, mask = torch.randn(6, 5, requires_grad=True), torch.rand(5, requires_grad=True)
    weights = [nn.Parameter(torch.randn(4, 5)) for _ in range(2)]
    masked_experts(x, mask, weights, recompute=True).sum().backward()
    assert {id(w) for w in _Counted.seen} == {id(w) for w in weights}


def test_an_input_that_is_itself_made_again_is_there_in_time() -> None:
    """Megatron's own recomputation of an activation (``recompute_modules: [moe_act]``) frees ``x`` in the same way."""
    x, mask = torch.randn(6, 5, requires_grad=True), torch.rand(5, requires_grad=True)
    weights = [nn.Parameter(torch.randn(4, 5))]
    expected = torch.autograd.grad(masked_experts(x.exp(), mask, weights, recompute=False).sum(), [x, mask])
    activated = x.exp()
    out = masked_experts(activated, mask, weights, recompute=True)
    storage, size = activated.untyped_storage(), activated.untyped_storage().nbytes()

    def refill(_: Tensor) -> None:
        storage.resize_(size)
        storage.copy_(x.detach().exp().untyped_storage())

    out.register_hook(refill)
    storage.resize_(0)
    for found, wanted in zip(torch.autograd.grad(out.sum(), [x, mask]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
