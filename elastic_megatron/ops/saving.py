"""Multiply activations by factors that need a gradient without keeping a second copy of them for the backward pass.

Autograd keeps ``x`` for the gradient of the factor, and the module that takes ``x * factor`` keeps the product: two
activations where the model without the factor keeps one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node


def rescaled(x: Tensor, factor: Tensor) -> Tensor:
    """``x * factor`` of ``x``'s type, for a 0-d factor that is not zero.

    The product is kept instead of ``x``, in the hope that the next module keeps it too: the gradient of the factor
    is ``sum(gradient * product) / factor``.
    """
    return _Rescaled.apply(x, factor) if factor.requires_grad and torch.is_grad_enabled() else x * factor


def recomputed(product: Tensor, x: Tensor, factor: Tensor, before: Node) -> None:
    """Give back the memory of ``product`` until ``before`` runs in the backward pass, where it is computed again.

    ``product`` is ``x * factor``, with a storage of its own that no later part of the forward pass reads. ``x`` is the
    copy that autograd keeps for the gradient of a factor of any value, zero included.

    Args:
        before: the node of the output of whatever took the product: those that saved it, or views of it, run later.

    Hooks on saved tensors would do the same for each view on its own, and hand the backward pass copies of parameters:
    Megatron's linears look on the parameter itself for ``main_grad`` and the flag of a fused weight gradient.
    """
    storage = product.untyped_storage()
    # of a version counter of its own: to autograd the product was never changed
    values, size, kept = product.data, storage.nbytes(), (x.detach(), factor.detach())

    def again(_: object) -> None:
        storage.resize_(size)
        torch.mul(*kept, out=values)

    # a node's own hooks run after those of its tensors, which Megatron's recomputation of x may be one of
    before.register_prehook(again)
    storage.resize_(0)


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        out = x * factor
        ctx.save_for_backward(out, factor)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out, factor = ctx.saved_tensors
        wide = torch.promote_types(torch.promote_types(grad.dtype, factor.dtype), torch.float32)
        total = (grad * out).sum(dtype=wide)
        return grad * factor, (total / factor).to(factor.dtype)
