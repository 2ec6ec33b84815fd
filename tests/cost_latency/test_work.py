"""Floating-point operations of jobs, against counts of what the code really runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layout_shapes import DENSE, NANO

from elastic_megatron.cost import account
from elastic_megatron.cost.draws import chances
from elastic_megatron.cost.work import (
    PUBLISHED_UTILIZATION,
    Fed,
    forward_flops,
    gpu_hours,
    ranking_flops,
    training_flops,
)
from elastic_megatron.importance import depth


def test_a_forward_pass_is_flops_per_token_times_tokens() -> None:
    fed = Fed(10, 8192)
    assert fed.tokens == 81920
    assert forward_flops(NANO, fed) == 81920 * account(NANO, context_length=8192).flops_per_token


def test_training_is_three_passes_of_the_student_and_one_of_the_teacher() -> None:
    fed = Fed(4, 128)
    one, other = forward_flops(DENSE, fed), forward_flops(NANO, fed)
    assert training_flops([(1, DENSE)], None, fed) == 3 * one
    assert training_flops([(1, DENSE)], DENSE, fed) == 4 * one
    assert training_flops([(1, DENSE)], DENSE, fed, recompute=True) == 5 * one
    assert training_flops([(1, DENSE)], NANO, fed) == 3 * one + other
    assert training_flops([(0.5, DENSE), (1, NANO)], NANO, fed) == 1.5 * one + 4 * other


@pytest.mark.parametrize(
    ("probs", "count", "expected"),
    [
        ((0.5, 0.3, 0.2), 1, (0.5, 0.3, 0.2)),
        ((0.5, 0.3, 0.2), 2, (1, 0.6, 0.4)),
        ((0.5, 0.3, 0.2), 3, (1, 1, 1)),
        ((0.8, 0.0, 0.2), 2, (1, 0, 1)),
        ((0.6, 0.2, 0.1, 0.1), 2, (1, 0.5, 0.25, 0.25)),
        ((0.6, 0.3, 0.05, 0.05), 3, (1, 1, 0.5, 0.5)),
    ],
)
def test_chances_of_several_budgets_sum_to_their_number(
    probs: tuple[float, ...], count: int, expected: tuple[float, ...]
) -> None:
    found = chances(probs, count)
    assert found == pytest.approx(expected) and sum(found) == pytest.approx(count)


def test_hours_are_of_one_gpu_at_a_share_of_its_peak() -> None:
    assert gpu_hours(3.6e15, 1.0, 1.0) == 1.0
    assert gpu_hours(3.6e15, 1.0, 0.25) == 4.0


def test_the_longer_estimate_is_what_modelopt_reports_of_this_parent() -> None:
    """Its README: 80e9 tokens at 8K and 20e9 at 32K into a student of 22B, about 9,000 H100-hours; 900 each 10e9."""
    student = NANO.override(hidden_size=2304, num_moe_experts=104, moe_shared_expert_intermediate_size=3072)
    fed = [Fed(round(tokens / n), n) for tokens, n in ((80e9, 8192), (20e9, 32768))]
    flops = sum(training_flops([(1, student)], NANO, each) for each in fed)
    least, most = PUBLISHED_UTILIZATION
    assert gpu_hours(flops, 989, least) == pytest.approx(9000, rel=0.03)
    assert gpu_hours(flops, 989, most) < 5000 and most == pytest.approx(153 / 989, abs=1e-3)


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_depth_is_ranked_by_as_many_layers_as_counted(monkeypatch: pytest.MonkeyPatch, layers: int) -> None:
    """The passes of ``depth_ranking`` itself, in layers run, plus the two that prove the sorting."""
    skipped, run = 0, 0

    @contextmanager
    def without(chunks: Sequence[Any], dropped: Sequence[int]) -> Iterator[None]:
        nonlocal skipped
        skipped = len(dropped)
        yield
        skipped = 0

    def forward_only(chunks: Sequence[Any], batches: Sequence[Any], consume: Any) -> list[Any]:
        nonlocal run
        run += (layers - skipped) * len(batches)
        return [consume(batch, torch.ones(1, 2)) for batch in batches]

    groups = SimpleNamespace(pp=SimpleNamespace(size=lambda: 1))
    chunk = SimpleNamespace(pg_collection=groups, parameters=lambda: iter([torch.ones(1)]))
    monkeypatch.setattr(depth, "without", without)
    monkeypatch.setattr(depth, "forward_only", forward_only)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    depth.depth_ranking([chunk], [{"tokens": torch.zeros(1, 2)}], layers=layers, iterative=True)
    fed = Fed(1, 128)
    shape = replace(DENSE, hybrid_layer_pattern="M" * layers)
    counted = ranking_flops(shape, fed, fed, widths=False, depth=True) / forward_flops(shape, fed)
    assert counted == pytest.approx(2 + run / layers)


def test_widths_take_one_pass_over_the_samples() -> None:
    samples, batch = Fed(64, 128), Fed(2, 128)
    one, both = forward_flops(DENSE, samples), forward_flops(DENSE, batch)
    assert ranking_flops(DENSE, samples, batch, widths=True, depth=False) == one + 2 * both
    assert ranking_flops(DENSE, samples, batch, widths=False, depth=False) == 2 * both
