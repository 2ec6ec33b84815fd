"""Multiply activations by factors that need a gradient without keeping a second copy of them for the backward pass.

Autograd keeps ``x`` for the gradient of the factor, and the module that takes ``x * factor`` keeps the product: two
activations where the model without the factor keeps one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rescaled(x: Tensor, factor: Tensor) -> Tensor:
    """``x * factor`` of ``x``'s type, for a 0-d factor that is not zero.

    The product is kept instead of ``x``, in the hope that the next module keeps it too: the gradient of the factor
    is ``sum(gradient * product) / factor``.
    """
    return _Rescaled.apply(x, factor) if factor.requires_grad and torch.is_grad_enabled() else x * factor


def recomputing(product: Tensor, x: Tensor, factor: Tensor) -> AbstractContextManager[Any]:
    """Context in which ``product``, and views of it, are saved for a backward pass as ``x`` and ``factor``.

    ``product`` is ``x * factor``, computed again when it is needed. ``x`` is the copy that autograd keeps for the
    gradient of a factor of any value, zero included.
    """
    memory, kept = product.untyped_storage().data_ptr(), (x.detach(), factor.detach())

    def pack(saved: Tensor) -> Any:
        if not saved.numel() or saved.untyped_storage().data_ptr() != memory:
            # a node that saves its own result would otherwise keep itself alive
            return saved.detach()
        return saved.shape, saved.stride(), saved.storage_offset(), *kept

    return torch.autograd.graph.saved_tensors_hooks(pack, _unpack)


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    shape, stride, offset, x, factor = packed
    return (x * factor).as_strided(shape, stride, offset)


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
