"""Rounding in training: the numbers that are stored forward, the gradient of the identity backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .formats import Format
from .packing import fake_quantise


def straight_through(form: Format, values: Tensor, amax: Tensor) -> Tensor:
    """``fake_quantise`` whose gradient passes straight through, as ModelOpt's default (``pass_through_bwd``)."""
    return _Rounded.apply(values, amax, form)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, amax: Tensor, form: Format) -> Tensor:
        return fake_quantise(form, values, amax)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad, None, None
