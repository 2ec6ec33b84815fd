"""The SSD recurrence token by token: the slow truth beside :mod:`.ssd`."""

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``state <- exp(dt A) state + dt x B^T;  y = (C . state + D x) silu(z)``, arXiv 2405.21060 equation (1).

    Shapes as in :func:`.ssd.mamba_chunk_scan_combined`; returns the output and the final states.
    """
    batch, length, heads, head_dim = x.shape
    repeat = heads // B.shape[2]
    B, C = B.repeat_interleave(repeat, dim=2), C.repeat_interleave(repeat, dim=2)
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)
    state = x.new_zeros(batch, heads, head_dim, B.shape[3]) if initial_states is None else initial_states
    outputs = []
    for t in range(length):
        write = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + write
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + (D[:, None] if D.dim() == 1 else D) * x
    return (y if z is None else y * F.silu(z)), state


def causal_conv1d_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``silu(sum_k weight[:, k] x_{t-width+1+k} + bias)``, shapes as in :func:`.ssd.causal_conv1d`."""
    width = weight.shape[1]
    past = F.pad(x, (0, 0, width - 1, 0))
    return F.silu(sum(weight[:, k] * past[:, k : k + x.shape[1]] for k in range(width)) + bias)
