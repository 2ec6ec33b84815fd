"""The short depthwise convolution in front of the SSD scan, with a hand-written backward pass.

``F.conv1d`` wants channels before time, and so costs two transposes and a grouped kernel of width four;
here each tap is one multiply-add over ``[batch, length, channels]`` as it lies.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_ELEMENTS = 262_144


class CausalConv(torch.autograd.Function):
    """``(x, weight, bias) -> silu(sum_k weight_k x_{t-width+1+k} + bias)``, or the sum alone without ``activate``.

    ``x`` ``[batch, length, channels]``, ``weight`` ``[width, channels]``, ``bias`` ``[channels]``; one dtype.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, activate: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.activate = activate
        out = x.new_empty(x.shape)
        for rows in _row_blocks(x):
            _convolve(x[rows], weight, bias, out=out[rows])
            if activate:
                F.silu(out[rows], inplace=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        width, length = weight.shape[0], x.shape[1]
        d_x = x.new_empty(x.shape)
        d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        for rows in _row_blocks(x):
            d_sum = d_out[rows]
            if ctx.activate:
                before = _convolve(x[rows], weight, bias, out=torch.empty_like(x[rows]))
                d_sum = torch.ops.aten.silu_backward(d_sum, before)
            d_bias += d_sum.sum((0, 1))
            torch.mul(d_sum, weight[-1], out=d_x[rows])
            product = d_sum * x[rows]
            d_weight[-1] += product.sum((0, 1))
            for lag in range(1, min(width, length)):
                late, early = d_sum[:, lag:], x[rows, :-lag]
                d_x[rows, :-lag].addcmul_(late, weight[-1 - lag])
                d_weight[-1 - lag] += torch.mul(late, early, out=product[:, lag:]).sum((0, 1))
        return d_x, d_weight, d_bias, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, *, out: Tensor) -> Tensor:
    torch.addcmul(bias, x, weight[-1], out=out)
    for lag in range(1, min(weight.shape[0], x.shape[1])):
        out[:, lag:].addcmul_(x[:, :-lag], weight[-1 - lag])
    return out


def _row_blocks(x: Tensor) -> list[slice]:
    """Slices of the batch of about ``_BLOCK_ELEMENTS``, so that the taps find their block in the cache."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, x[0].numel()))
    return [slice(i, i + rows) for i in range(0, x.shape[0], rows)]
