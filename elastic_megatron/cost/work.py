"""Floating-point operations of a job, and the time they take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..space import ParentShape
from .account import flops_per_token
from .sizes import ModelSizes, sizes_of_parent

# Shares of an H100's dense BF16 rate that published training of MoE models reached, by the operations counted here.
# The slower: ModelOpt distilled Nemotron 3 Nano into 22B in about 9,000 hours for 100e9 tokens
# (examples/pruning/minitron/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16/README.md). The faster: Megatron-Bridge pre-trains
# GPT-OSS 120B in BF16 at 153 of 989 TFLOP/s (docs/performance-summary.md, container 25.11).
PUBLISHED_UTILIZATION = (0.08, 0.155)


@dataclass(frozen=True)
class Fed:
    """Sequences of one length that a job reads."""

    sequences: int
    seq_length: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.seq_length


def forward_flops(model: ParentShape | ModelSizes, fed: Fed) -> float:
    """One forward pass over all of it (``account.flops_per_token`` says what counts)."""
    sizes = sizes_of_parent(model) if isinstance(model, ParentShape) else model
    return fed.tokens * flops_per_token(sizes, fed.seq_length)


def training_flops(
    students: Iterable[tuple[float, ParentShape | ModelSizes]],
    teacher: ParentShape | None,
    fed: Fed,
    *,
    recompute: bool = False,
) -> float:
    """Forward and backward passes of students, 3 forward passes (4 with full recomputation), and 1 of the teacher.

    Evaluation and the optimiser, less than a hundredth in any sensible run, are left out.

    Args:
        students: how often each is run on the tokens, and what is computed of it.
    """
    passes = 4 if recompute else 3
    student = sum(share * forward_flops(model, fed) for share, model in students)
    return passes * student + (forward_flops(teacher, fed) if teacher is not None else 0.0)


def ranking_flops(shape: ParentShape, fed: Fed, batch: Fed, *, widths: bool, depth: bool) -> float:
    """What ``rank`` computes: forward passes only.

    Widths take one pass over the samples. Depth measures one ``batch`` without each layer, then again after each layer
    that is dropped for good: with k of L layers gone, 1 pass of all layers and L - k passes of L - k - 1 layers. Two
    passes of the batch prove that sorting changed nothing.
    """
    layers = shape.num_layers
    passes = 2.0
    if depth:
        passes += sum(1 + (layers - k) * (layers - k - 1) / layers for k in range(layers))
    return (forward_flops(shape, fed) if widths else 0.0) + passes * forward_flops(shape, batch)


def gpu_hours(flops: float, bf16_tflops: float, utilization: float) -> float:
    """Hours of one GPU at a share of its peak rate."""
    return flops / (bf16_tflops * 1e12 * utilization) / 3600
