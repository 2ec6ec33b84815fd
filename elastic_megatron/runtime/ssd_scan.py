"""The chunked SSD scan with a hand-written backward pass: the inner part of :mod:`.ssd`.

Dao & Gu, *Transformers are SSMs* (arXiv 2405.21060), section 6: inside a chunk the recurrence is a
masked matrix product, between chunks it is a recurrence over one state per chunk.  With
``cum_i = a_1 + .. + a_i`` inside a chunk,

    y_i     = sum_{j<=i} (C_i . B_j) exp(cum_i - cum_j) dt_j x_j  +  exp(cum_i) C_i . state
    state'  = exp(cum_q) state + sum_j exp(cum_q - cum_j) dt_j x_j B_j^T

A machine's memory is the limit here, not its arithmetic: an elementwise pass over a tensor that has
left the cache costs as much as the matrix product that made it.  So the work is done in blocks of
sequences and groups that fit the second-level cache, forward keeps only the states between chunks,
and backward rebuilds the ``[chunk, chunk]`` matrices of its block instead of reading them back.

Shape letters: N sequences, c chunks, q tokens of a chunk, g groups, r heads of a group, p channels of a
head, n state size.  Tensors of heads come as ``Ncqgrp``; two layouts are used inside, ``Ncgrqp`` for
products that differ by head and ``Ncgq(rp)`` for those whose B or C the heads of a group share.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK_ELEMENTS = 262_144  # of one tensor; a few of them share the cache


class ChunkScan(torch.autograd.Function):
    """``(x, dt, a, B, C, D, z, state) -> (y, final_state)``.

    ``x``, ``z`` ``[N, c, q, g, r, p]``; ``dt`` and the log decay ``a = dt * A`` ``[N, c, q, g, r]``; ``B``, ``C``
    ``[N, c, q, g, n]``; ``D`` ``[g, r, p]`` or ``[g, r, 1]`` or None; ``z`` may be None; ``state`` ``[N, g, n, r, p]``.
    ``y = (scan + D * x) * silu(z)``, shaped like ``x``.  All of one dtype, fp32 or fp64.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dt: Tensor, a: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
                z: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        N, c, _, g, r, p = x.shape
        scan = x.new_empty(x.shape)
        enter = x.new_empty(N, c, g, state.shape[2], r, p)
        final = torch.empty_like(state)
        out = scan if D is None and z is None else torch.empty_like(scan)
        for rows, group in _blocks(x):
            _forward_block(
                *(t[rows, :, :, group] for t in (x, dt, a, B, C)),
                state=state[rows, group],
                enter=enter[rows, :, group],
                final=final[rows, group],
                scan=scan[rows, :, :, group],
            )
            if out is not scan:
                _skip_and_gate(*_gate_block(scan, x, D, z, rows, group), out=out[rows, :, :, group])
        ctx.save_for_backward(x, dt, a, B, C, D, z, enter, final, scan)
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        x, dt, a, B, C, D, z, enter, final, scan = ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros_like(scan)
        d_x, d_dt, d_a, d_B, d_C = (t.new_empty(t.shape) for t in (x, dt, a, B, C))
        d_D = None if D is None else torch.zeros_like(D)
        d_z = None if z is None else z.new_empty(z.shape)
        d_state = torch.empty_like(final)
        for rows, group in _blocks(x):
            d_scan = d_out[rows, :, :, group]
            if z is not None and d_z is not None:
                d_scan = _gate_backward(
                    d_scan, *_gate_block(scan, x, D, z, rows, group), d_z=d_z[rows, :, :, group]
                )
            d_block_x = d_x[rows, :, :, group]
            grads = _backward_block(
                *(t[rows, :, :, group] for t in (x, dt, a, B, C)),
                enter=enter[rows, :, group],
                final=final[rows, group],
                scan=scan[rows, :, :, group],
                d_scan=d_scan,
                d_final=None if d_final is None else d_final[rows, group],
                d_x=d_block_x,
            )
            if D is not None and d_D is not None:
                d_block_x.addcmul_(d_scan, D[group])
                d_D[group] += (d_scan * x[rows, :, :, group]).sum((0, 1, 2)).sum_to_size(D[group].shape)
            for whole, part in zip((d_dt, d_a, d_B, d_C), grads, strict=False):
                whole[rows, :, :, group] = part
            d_state[rows, group] = grads[4]
        return d_x, d_dt, d_a, d_B, d_C, d_D, d_z, d_state


def _blocks(x: Tensor) -> list[tuple[slice, slice]]:
    """Slices of sequences, and of groups where one sequence is too large, of about ``_BLOCK_ELEMENTS``."""
    N, _, _, g, _, _ = x.shape
    per_group = max(1, x.numel() // max(1, N * g))
    groups = min(g, max(1, _BLOCK_ELEMENTS // per_group))
    rows = max(1, _BLOCK_ELEMENTS // (per_group * g)) if groups == g else 1
    return [
        (slice(i, min(i + rows, N)), slice(j, min(j + groups, g)))
        for i in range(0, N, rows)
        for j in range(0, g, groups)
    ]


def _forward_block(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    state: Tensor,
    enter: Tensor,
    final: Tensor,
    scan: Tensor,
) -> None:
    """Fill ``enter`` (the state before each chunk), ``final`` and ``scan`` (y without D and z)."""
    cum = a.cumsum(2)
    B, C = (t.transpose(2, 3).contiguous() for t in (B, C))  # Ncgqn
    _, weights = _chunk_weights(cum, B, C)
    within = weights @ _head_major(x, dt)
    injected = B.mT @ _group_major(x, dt * (cum[:, :, -1:] - cum).exp())
    injected = injected.unflatten(-1, x.shape[-2:])  # Ncgnrp
    decay = cum[:, :, -1].exp()[:, :, :, None, :, None]
    enter[:, 0] = state
    for i in range(x.shape[1]):
        after = enter[:, i + 1] if i + 1 < x.shape[1] else final
        torch.addcmul(injected[:, i], enter[:, i], decay[:, i], out=after)
    carried = (C @ enter.flatten(-2)).unflatten(-1, x.shape[-2:])  # Ncgqrp
    torch.addcmul(within.permute(0, 1, 4, 2, 3, 5), carried.transpose(2, 3), cum.exp()[..., None], out=scan)


def _backward_block(
    x: Tensor, dt: Tensor, a: Tensor, B: Tensor, C: Tensor, *,
    enter: Tensor, final: Tensor, scan: Tensor, d_scan: Tensor, d_final: Tensor | None, d_x: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Fill ``d_x`` and return the gradients of ``dt, a, B, C, state``.

    The gradient of ``cum`` needs no ``[q, q]`` pass: ``cum_i`` multiplies all of ``y_i`` and divides all
    that ``x_i`` feeds, so it is ``dy_i . y_i - dt_i x_i . d(dt_i x_i)``; the last one of a chunk also
    scales the state that leaves it.
    """
    cum = a.cumsum(2)
    B, C = (t.transpose(2, 3).contiguous() for t in (B, C))
    decays, weights = _chunk_weights(cum, B, C)
    to_end = (cum[:, :, -1:] - cum).exp()
    d_heads = _head_major(d_scan)
    d_within = weights.mT @ d_heads  # d(dt x) inside the chunk, Ncgrqp
    d_scores = ((d_heads @ _head_major(x, dt).mT).mul_(decays)).sum(3)  # Ncgqq

    d_carried = _group_major(d_scan, cum.exp())
    d_C = d_carried @ enter.flatten(-2).mT
    d_C += d_scores @ B
    d_after, d_state = _state_gradients(
        (C.mT @ d_carried).unflatten(-1, x.shape[-2:]), cum[:, :, -1].exp(), d_final
    )
    d_injected = d_after.flatten(-2)
    d_B = _group_major(x, dt * to_end) @ d_injected.mT
    d_B += d_scores.mT @ C
    d_fed = (B @ d_injected).unflatten(-1, x.shape[-2:]).transpose(2, 3)  # Ncqgrp

    torch.addcmul(d_within.permute(0, 1, 4, 2, 3, 5), d_fed, to_end[..., None], out=d_x)  # of dt x
    d_dt = (d_x * x).sum(-1)
    d_cum = (d_scan * scan).sum(-1).sub_(dt * d_dt)
    d_cum[:, :-1, -1] += (d_after[:, :-1] * enter[:, 1:]).sum((3, 5))
    if d_final is not None:
        d_cum[:, -1, -1] += (d_final * final).sum((2, 4))
    d_a = d_cum.flip(2).cumsum(2).flip(2)
    d_x.mul_(dt[..., None])
    return d_dt, d_a, d_B.transpose(2, 3), d_C.transpose(2, 3), d_state


def _chunk_weights(cum: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """``exp(cum_i - cum_j)`` for ``j <= i``, else 0, and the same times ``C_i . B_j``; both ``Ncgrqq``."""
    heads = cum.permute(0, 1, 3, 4, 2).contiguous()
    # Above the diagonal the exponent is positive and may overflow; tril_ overwrites, it does not multiply.
    decays = (heads[..., :, None] - heads[..., None, :]).exp_().tril_()
    return decays, decays * (C @ B.mT)[:, :, :, None]


def _state_gradients(d_enter: Tensor, decay: Tensor, d_final: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run the recurrence between chunks backwards.

    ``d_enter`` ``Ncgnrp`` is what each chunk's outputs ask of the state before it.  Returns the gradient of
    the state *after* each chunk, ``Ncgnrp``, and that of the initial state.
    """
    d_after = torch.empty_like(d_enter)
    if d_final is None:
        d_after[:, -1] = 0
    else:
        d_after[:, -1] = d_final
    decay = decay[:, :, :, None, :, None]
    for i in range(d_enter.shape[1] - 1, 0, -1):
        torch.addcmul(d_enter[:, i], d_after[:, i], decay[:, i], out=d_after[:, i - 1])
    return d_after, torch.addcmul(d_enter[:, 0], d_after[:, 0], decay[:, 0])


def _head_major(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """``x`` (times ``scale``) as contiguous ``Ncgrqp``, in one pass."""
    view = x.permute(0, 1, 3, 4, 2, 5)
    out = x.new_empty(view.shape)
    if scale is None:
        return out.copy_(view)
    return torch.mul(view, scale.permute(0, 1, 3, 4, 2)[..., None], out=out)


def _group_major(x: Tensor, scale: Tensor) -> Tensor:
    """``x`` times ``scale`` as contiguous ``Ncgq(rp)``, in one pass."""
    view = x.transpose(2, 3)
    out = x.new_empty(view.shape)
    return torch.mul(view, scale.transpose(2, 3)[..., None], out=out).flatten(-2)


def _gate_block(
    scan: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None, rows: slice, group: slice
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    return (
        scan[rows, :, :, group],
        x[rows, :, :, group],
        None if D is None else D[group],
        None if z is None else z[rows, :, :, group],
    )


def _skip_and_gate(scan: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None, *, out: Tensor) -> None:
    """``(scan + D * x) * silu(z)``."""
    value = scan if D is None else torch.addcmul(scan, x, D)
    torch.mul(value, F.silu(z), out=out) if z is not None else out.copy_(value)


def _gate_backward(
    d_out: Tensor, scan: Tensor, x: Tensor, D: Tensor | None, z: Tensor, *, d_z: Tensor
) -> Tensor:
    """Fill ``d_z`` and return the gradient of ``scan + D * x``."""
    value = scan if D is None else torch.addcmul(scan, x, D)
    torch.ops.aten.silu_backward.grad_input(d_out * value, z, grad_input=d_z)
    return d_out * F.silu(z)
