"""The kernels of a GPU on paper: functions that compute nothing, and tell what their kernels would do.

On a GPU a model runs on Transformer Engine, FlashAttention and mamba-ssm. Each of their kernels reads its arguments
and writes its results once. How many there are, from their sources:

- Transformer Engine 2.20.2: a norm is one kernel, its backward pass two (``rmsnorm_bwd`` adds up the weight's gradient
  after it); ``te_general_grouped_gemm`` launches a GEMM for every expert; ``pytorch/triton/permutation.py`` makes a
  map in three kernels and moves rows in one. Weight gradients are added to ``main_grad`` inside their GEMM.
- FlashAttention: one kernel; three backward (a dot product, the gradients, a conversion), which make the logits again.
- mamba-ssm 2.3.2.post1: ``SCAN`` below, which ``tests/mamba`` compares with what runs in Triton's interpreter.
- torch.compile makes one kernel of squared ReLU, and one of its product with routing weights.

Everything else, and so whatever elasticity adds, is torch's own and counted as it comes.
"""

from __future__ import annotations

from typing import Any

import torch
from counting import kernel, size
from torch import Tensor
from torch.autograd import Function

# kernels of ``mamba_split_conv1d_scan_combined``, forward and backward, causal-conv1d's among them
SCAN = (6, 17)


class Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        out, scale = _like(x), new(x, x.shape[:-1], torch.float32)
        ctx.save_for_backward(x, weight, scale)
        kernel("norm", [x, weight], [out, scale])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        out = _like(x), _like(weight)
        kernel("norm_backward", [grad, x, weight, scale], out, launches=2)
        return out


class Gemm(Function):
    """``x @ weight.T`` of one weight, or of one for each group of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        out = new(x, (*x.shape[:-1], weights[0].shape[0]), x.dtype)
        ctx.flops = 2 * out.numel() * x.shape[-1]
        kernel("gemm", [x, *weights], [out], flops=ctx.flops, launches=len(weights))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        if not grad.is_contiguous():
            grad = grad.contiguous()
        dx = _like(x)
        kernel("gemm", [grad, *weights], [dx], flops=ctx.flops, launches=len(weights))
        sums = [getattr(w, "main_grad", None) for w in weights]
        made = [None if s is not None else _like(w) for s, w in zip(sums, weights, strict=True)]
        added = [s for s in sums if s is not None]
        fresh = [m for m in made if m is not None]
        kernel("gemm", [grad, x, *added], [*added, *fresh], flops=ctx.flops, launches=len(weights))
        return dx, *made


class Attention(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, b, heads, dim = q.shape
        out, sums = _like(q), new(q, (b, heads, s), torch.float32)
        ctx.save_for_backward(q, k, v, out, sums)
        # two products, of which a causal mask leaves half
        ctx.flops = 2 * b * heads * s * s * dim
        kernel("attention", [q, k, v], [out, sums], flops=ctx.flops)
        return out.flatten(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        q, k, v, out, sums = ctx.saved_tensors
        made = tuple(map(_like, (q, k, v)))
        reads = [grad, q, k, v, out, sums]
        kernel("attention_backward", reads, made, flops=5 * ctx.flops // 2, launches=3,
               more=2 * size(grad) + 8 * q.numel())  # fmt: skip
        return made


class Scan(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, a: Tensor, d: Tensor,
                chunk: int, head_dim: int, groups: int) -> Tensor:  # fmt: skip
        batch, length, _ = rows.shape
        heads = a.shape[0]
        convolved = weight.shape[0]
        state = (convolved - heads * head_dim) // (2 * groups)
        out = new(rows, (batch, length, heads * head_dim), rows.dtype)
        ctx.save_for_backward(rows, weight, bias, dt_bias, a, d, out)
        tokens = batch * length
        # products: C with B; those with x; x with B, the chunk's state; C with the state
        ctx.flops = 2 * tokens * (
            groups * chunk * state + heads * chunk * head_dim + 2 * heads * head_dim * state
        )  # fmt: skip
        # between kernels: the convolution's output, fp32 states of chunks (made, passed on, used), and B with C
        ctx.between = (
            2 * tokens * convolved * rows.element_size()
            + 4 * 4 * (tokens // chunk) * heads * head_dim * state
            + 2 * 4 * tokens * chunk * groups
        )
        kernel("scan", [rows, weight, bias, dt_bias, a, d], [out], flops=ctx.flops, launches=SCAN[0],
               more=ctx.between)  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight, bias, dt_bias, a, d, out = ctx.saved_tensors
        made = tuple(map(_like, (rows, weight, bias, dt_bias, a, d)))
        # most of the forward pass again, and twice its products
        kernel("scan_backward", [grad, rows, weight, bias, dt_bias, a, d, out], made, flops=3 * ctx.flops,
               launches=SCAN[1], more=3 * ctx.between)  # fmt: skip
        return *made, None, None, None


class Rows(Function):
    """A kernel that moves rows, with the weights that go with them; backward it moves their gradients back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, probs: Tensor | None, rows: int, launches: int
    ) -> tuple[Tensor, Tensor | None]:
        out = new(x, (rows, x.shape[-1]), x.dtype)
        moved = None if probs is None else new(probs, (rows,), probs.dtype)
        most = x if x.shape[0] > rows else out  # rows that go to several places are read as often
        ctx.shapes = x.shape, None if probs is None else probs.shape
        kernel("move_rows", [most] + ([] if moved is None else [moved]), [out] + ([] if moved is None else [moved]),
               launches=launches)  # fmt: skip
        return out, moved

    @staticmethod
    def backward(ctx: Any, grad: Tensor, d_probs: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        shape, probs = ctx.shapes
        dx = new(grad, shape, grad.dtype)
        most = grad if grad.shape[0] > shape[0] else dx
        dp = None if probs is None or d_probs is None else new(d_probs, probs, d_probs.dtype)
        kernel(
            "move_rows", [most] + ([] if d_probs is None else [d_probs]), [dx] + ([] if dp is None else [dp])
        )
        return dx, dp, None, None


class SquaredRelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor | None) -> Tensor:
        out = _like(x)
        ctx.save_for_backward(x, *([] if weights is None else [weights]))
        kernel("squared_relu", ctx.to_save, [out])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        made = [_like(x), *map(_like, weights)]
        kernel("squared_relu_backward", [grad, x, *weights], made)
        return made[0], made[1] if weights else None


def new(like: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def _like(x: Tensor) -> Tensor:
    return new(x, x.shape, x.dtype)
