"""Randomness as an argument: draws are pure functions of a key, and the Gumbel-Softmax built on them.

Every rank that evaluates the same key gets the same numbers, with no generator state to carry: draws agree
without communication, and a resumed run repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate, pairwise
from math import ceil

import torch
from torch import Tensor

from ..cost.draws import chances

Key = tuple[int | str, ...]


def uniform(key: Key, shape: Sequence[int]) -> Tensor:
    """Uniform numbers in (0, 1), fp64 on the CPU, determined by ``key`` alone."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    u = torch.rand(tuple(shape), dtype=torch.float64, generator=generator)
    return u.clamp_(1e-12, 1 - 1e-12)


def draw_index(key: Key, probs: Sequence[float]) -> int:
    """An index drawn with the given probabilities."""
    u, total = float(uniform(key, ())), 0.0
    for i, p in enumerate(probs):
        total += p
        if u < total:
            return i
    return max(i for i, p in enumerate(probs) if p > 0)


def draw_several(key: Key, probs: Sequence[float], count: int) -> list[tuple[int, float]]:
    """``count`` different indices, each with the weight that keeps expectations those of one draw.

    Index i is among them with probability q_i (``cost.draws.chances``), and then weighs p_i / q_i: so the expected sum
    of ``weight * value`` is that of ``value`` under ``probs`` (Horvitz and Thompson, 1952). One uniform number chooses
    them all (systematic sampling: Madow, 1949). ``count`` = 1 is ``draw_index``.

    Raises:
        ValueError: fewer than ``count`` indices have a probability above 0.
    """
    possible = sum(p > 0 for p in probs)
    if count > possible:
        raise ValueError(f"{count} different draws from {possible} possible values")
    if count == 1:
        return [(draw_index(key, probs), 1.0)]
    chance = chances(probs, count)
    start, edges = float(uniform(key, ())), [0.0, *accumulate(chance)]
    last = max(i for i, p in enumerate(probs) if p > 0)
    edges[last + 1 :] = [float(count)] * (len(probs) - last)  # which they are but for rounding
    picked = [i for i, (low, high) in enumerate(pairwise(edges)) if ceil(low - start) < ceil(high - start)]
    return [(i, probs[i] / chance[i]) for i in picked]


def gumbel_noise(key: Key, like: Tensor) -> Tensor:
    """Standard Gumbel noise shaped, typed and placed like ``like``."""
    noise = -(-uniform(key, like.shape).log()).log()
    return noise.to(like.device, like.dtype, non_blocking=True)  # to a GPU, or the host would wait for it


def gumbel_softmax(logits: Tensor, noise: Tensor, tau: float, hard: bool) -> Tensor:
    """Probabilities over the last dimension at temperature ``tau`` (arXiv 1611.01144).

    With ``hard`` the forward value is the one-hot of the largest entry and the gradient that of the soft
    probabilities (straight-through).
    """
    soft = torch.softmax((logits + noise) / tau, dim=-1)
    if not hard:
        return soft
    one_hot = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return one_hot + (soft - soft.detach())
