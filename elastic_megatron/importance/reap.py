"""REAP: router-weighted expert activation pruning (arXiv 2510.13999), with the model's own routing.

S_j is the mean, over the tokens routed to expert j, of g_j(x) * ||f_j(x)||_2: g_j what the moe_router returns
(for Nemotron-H: selected by sigmoid score plus correction bias, weighted by the unbiased score renormalised
over the selected experts), f_j the expert's unweighted output.

Megatron multiplies the activations before ``linear_fc2`` by g_j >= 0, and ``linear_fc2`` is linear without
bias, so what an expert returns is g_j * f_j already and its norm is the summand itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import blocks

UNSEEN = float("-inf")
"""Score of an expert that no token was routed to: below every other, and not mistaken for a measured zero."""


def expert_sums(output: Tensor, tokens: Tensor) -> Tensor:
    """[experts] float64: sum over an expert's tokens of the norm of its weighted output.

    Args:
        output: [routed tokens, hidden_size], expert after expert, router weights applied.
        tokens: [experts] integers, how many rows belong to each expert.
    """
    dtype = torch.promote_types(output.dtype, torch.float32)
    norms = torch.cat([torch.linalg.vector_norm(rows, dim=-1, dtype=dtype) for rows in blocks(output)])
    return torch.segment_reduce(norms.double(), "sum", lengths=tokens.to(norms.device, torch.int64))


def reap_score(sums: Tensor, tokens: Tensor) -> Tensor:
    """[experts] float64: mean summand per routed token; ``UNSEEN`` for experts without tokens."""
    return torch.where(tokens > 0, sums / tokens.clamp_min(1), UNSEEN)
