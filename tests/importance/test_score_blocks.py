"""Sums over tokens do not depend on how tokens are cut into blocks, nor on the kernel that a device takes."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from importance_models import relative
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from elastic_megatron.importance import expert_sums, scores

sizes = st.integers(1, 9)
cached = st.sampled_from([1, 5, 40, 1 << 17])
on_cpu = st.booleans()


def activations(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Not contiguous: columns of a wider tensor, as those of a fused projection are."""
    *leading, channels = shape
    wide = torch.randn(
        *leading, channels + 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return wide.to(dtype)[..., 2 : 2 + channels]


def cut(elements: int, on_cpu: bool) -> Any:
    """Blocks of about so many elements, by the kernels of a CPU or those of an accelerator."""
    return patch.multiple(scores, _CACHED=elements, _HELD=elements, _on_cpu=lambda _: on_cpu)


@given(sizes, sizes, sizes, cached, on_cpu)
@settings(max_examples=60, deadline=None)
def test_sums_of_powers_are_their_definitions(length, batch, channels, elements, cpu):
    x = activations(length, batch, channels)
    with cut(elements, cpu):
        assert relative(scores.abs_sum(x), x.abs().sum((0, 1))) < 1e-13
        assert relative(scores.square_sum(x), x.square().sum((0, 1))) < 1e-13


@given(sizes, sizes, sizes, st.integers(1, 5), cached, on_cpu)
@settings(max_examples=100, deadline=None)
def test_states_are_convolved_across_blocks(length, batch, states, taps, elements, cpu):
    """Also where a block, or the sequence, is shorter than the convolution."""
    bc = activations(length, batch, 2 * states)
    weight, bias = activations(2 * states, 1, taps, seed=1), activations(2 * states, seed=2)
    padded = F.conv1d(bc.permute(1, 2, 0), weight, bias, padding=taps - 1, groups=2 * states)
    truth = F.silu(padded[..., :length]).square().sum((0, 2)).view(2, 1, states)
    with cut(elements, cpu):
        assert relative(scores.mamba_states(bc, weight, bias, 1), truth) < 1e-13


@given(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(sum), cached, on_cpu)
@settings(max_examples=40, deadline=None)
def test_experts_sum_the_norms_of_their_own_rows(counts, elements, cpu):
    output = activations(sum(counts), 7)
    truth = torch.stack([rows.norm(dim=-1).sum() for rows in output.split(counts)])
    with cut(elements, cpu):
        assert relative(expert_sums(output, torch.tensor(counts)), truth) < 1e-13


def test_no_tokens_are_sums_of_zero():
    for cpu in (True, False):
        with cut(8, cpu):
            assert scores.abs_sum(torch.ones(0, 5)).tolist() == [0.0] * 5
            assert expert_sums(torch.ones(0, 5), torch.tensor([0, 0])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("cpu", "rounding"), [(True, 2e-7), (False, 1e-5)], ids=["cpu", "accelerator"])
def test_sums_of_low_precision_are_taken_in_fp32(dtype, cpu, rounding):
    x = activations(3000, 1, 5, dtype=dtype)
    with cut(512, cpu):
        assert relative(scores.abs_sum(x), x.double().abs().sum((0, 1))) < rounding
        assert relative(scores.square_sum(x), x.double().square().sum((0, 1))) < rounding
        norms = expert_sums(x.flatten(0, 1), torch.tensor([1000, 2000]))
    truth = x.double().norm(dim=-1).flatten()
    assert relative(norms, torch.stack([truth[:1000].sum(), truth[1000:].sum()])) < rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_copy_of_an_activation_is_made(dtype):
    """What a score makes in passing is a few blocks, however many tokens there are."""
    x, counts = activations(4096, 4, 64, dtype=dtype), torch.full((4,), 4096)
    weight, bias = activations(64, 1, 4, dtype=dtype), activations(64, dtype=dtype)

    def score() -> None:
        scores.abs_sum(x)
        scores.square_sum(x)
        scores.mamba_states(x, weight, bias, 1)

    def reap() -> None:
        expert_sums(x.flatten(0, 1), counts)

    with cut(4096, True):
        assert peak(score) < 6 * 4096 * 4
        # a norm for every token, in fp32, joined, and in fp64
        assert peak(reap) < 6 * 4096 * 4 + 4 * 4096 * (4 + 4 + 8)


def peak(run) -> int:
    """Most bytes that torch holds at a time during a call, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    held = most = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
