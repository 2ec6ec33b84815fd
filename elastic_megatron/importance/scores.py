"""Importance scores as pure functions of activations: what one forward pass adds, and what the sums mean.

Formulas are those of Nemotron Elastic (arXiv 2511.16664, section on importance) where it has one; where it
has none the docstring says that the choice is ours. Every score is a function of sums over tokens, so nothing
is kept but one float64 number per component: activations are summed in fp32 or better within a forward pass
and in float64 across passes (all terms are non-negative, nothing cancels).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce

import torch
from torch import Tensor

from ..space import ParentShape

# elements of a block of rows: on a CPU half a megabyte in fp32, with its temporaries less than a core's own cache;
# elsewhere work for every core
_CACHED, _HELD = 1 << 17, 1 << 24


def wide(x: Tensor) -> Tensor:
    """``x`` in fp32, or in its own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def abs_sum(x: Tensor) -> Tensor:
    """[..., channels] -> [channels] float64: sum over tokens of the absolute value."""
    return _power_sum(x, 1)


def square_sum(x: Tensor) -> Tensor:
    """[..., channels] -> [channels] float64: sum over tokens of the square."""
    return _power_sum(x, 2)


def blocks(x: Tensor) -> Iterator[Tensor]:
    """[..., channels] in blocks of [rows, channels]: what a sum over it reads and makes is in the cache.

    On a CPU in fp32 or better and small, so that no temporary travels to memory and back; elsewhere all rows as they
    are, because kernels there widen while they reduce.
    """
    rows = x.flatten(0, -2)
    if not _on_cpu(x):
        yield rows
        return
    for block in rows.split(max(1, _CACHED // x.shape[-1])):
        yield wide(block)


def _power_sum(x: Tensor, power: int) -> Tensor:
    return reduce(torch.add, (_block_sum(block, power) for block in blocks(x)))


def _block_sum(rows: Tensor, power: int) -> Tensor:
    if _on_cpu(rows):
        # the kernel for norms is 20 times as slow along this dimension
        return (rows.abs() if power == 1 else rows.square()).sum(0).double()
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows, power, dim=0, dtype=dtype).double() ** power


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension, for norms that are fused into a linear and have no output of their own.

    In ``x``'s type, as what a norm that is not fused puts out.
    """
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def mamba_channels(zxbcdt: Tensor, heads: int, head_dim: int) -> Tensor:
    """[heads, head_dim] float64: squares of the x rows of ``in_proj``'s output, summed over tokens.

    Args:
        zxbcdt: output of ``in_proj``, [..., z | x | B | C | dt].
    """
    inner = heads * head_dim
    return square_sum(zxbcdt[..., inner : 2 * inner]).view(heads, head_dim)


def mamba_states(bc: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """[2, groups, states] float64: squares of B and of C after convolution and SiLU, summed over tokens.

    Args:
        bc: the columns [B | C] of ``in_proj``'s output over whole sequences, [sequence, batch, 2 groups states].
        weight: [2 groups states, 1, taps], those channels of the causal convolution.
        bias: [2 groups states].
    """
    dtype = torch.promote_types(bc.dtype, torch.float32)
    taps, bias = weight[:, 0].t().to(dtype).contiguous(), bias.to(dtype)
    length, past = len(bc), len(taps) - 1
    step = max(1, (_CACHED if _on_cpu(bc) else _HELD) // bc[0].numel())
    total = torch.zeros(bc.shape[-1], dtype=torch.float64, device=bc.device)
    for start in range(0, length, step):
        # before the sequence there are zeros, before a block there is the block before it
        before = min(start, past)
        x = bc[start - before : start + step].to(dtype)
        out = torch.addcmul(bias, x[before:], taps[past])
        for back in range(1, min(past + 1, len(x))):
            first = max(0, back - before)
            out[first:].addcmul_(x[before - back + first : len(x) - back], taps[past - back])
        total += torch.nn.functional.silu(out, inplace=True).square_().sum((0, 1))
    return total.view(2, groups, -1)


def query_head_score(squares: Tensor, parent: ParentShape) -> Tensor:
    """[rows of ``linear_qkv``] -> [heads]: norm of each head's query over tokens and channels.

    The rows are, for each KV group, its query heads, its key, its value.
    """
    per_group = parent.num_attention_heads // parent.num_query_groups
    rows = squares.view(parent.num_query_groups, per_group + 2, parent.kv_channels)
    return rows[:, :per_group].sum(-1).flatten().sqrt()


def head_dim_score(squares: Tensor) -> Tensor:
    """[heads, head_dim] -> [head_dim]: s_d = ||s_{:,d}||_2 over tokens and heads; one order for all heads."""
    return squares.sum(0).sqrt()


def mamba_head_score(squares: Tensor, kept: int | None) -> Tensor:
    """[heads, head_dim] -> [heads]: f_h = ||s_{h, kept channels}||_2 over tokens.

    The kept channels are the ``kept`` best by ``head_dim_score``: those of the smallest submodel where
    ``mamba_head_dim`` is elastic too; ``None`` keeps all.
    """
    if kept is not None:
        best = head_dim_score(squares).sort(descending=True, stable=True).indices[:kept]
        squares = squares[:, best]
    return squares.sum(1).sqrt()


def state_score(squares: Tensor) -> Tensor:
    """[2, groups, states] -> [states]: sum over groups of ||B_n||_2 ||C_n||_2; one order for all groups.

    Ours, the literature has none. All states of a head decay alike, so state n adds
    C_n(t) * sum_s decay(t, s) B_n(s) x(s) to the output, which the product of the two norms over tokens
    bounds; the product does not change when B_n is scaled by c and C_n by 1/c, which the model cannot see
    either. The order is common because a slice takes the same states in every group.
    """
    return squares.sqrt().prod(0).sum(0)
