"""Training under every layout is training in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import training_jobs
from layouts import LAYOUTS, Layout
from pool import RankPool
from runs import BATCH, BUDGETS, LENGTH, OPTIMIZER, ROUTER, STEPS, assert_same_losses, per_draw

SLICED_STEPS = 5
SEVERAL = {"budgets_per_batch": 2, "tokens": SLICED_STEPS * BATCH * LENGTH}
HARD = {"router": {**ROUTER, "sampling": "hard"}}


@pytest.fixture(scope="session")
def alone(write: Callable[..., Path], ranks: RankPool) -> Callable[..., dict[str, Any]]:
    """The run in one process, by model and draws; where these are hard, masked."""
    found: dict[tuple[bool, int, bool], dict[str, Any]] = {}

    def run(moe: bool, per_draw: int, hard: bool = False) -> dict[str, Any]:
        key = moe, per_draw, hard
        if key not in found:
            sections = {**HARD, "stage": {**SEVERAL, "execution": "masked"}} if hard else {}
            name = f"alone_{moe}_{per_draw}_{hard}"
            file = write(name, moe, per_draw, {"recompute": "full"}, **sections)
            (found[key],) = ranks.run(training_jobs.trained, 1, str(file), timeout=240)
        return found[key]

    return run


def steps_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [line for line in run["lines"] if "loss" in line]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_ten_steps_are_those_of_one_process(
    layout: Layout, write: Callable[..., Path], alone: Callable[..., Any], ranks: RankPool, record: Any
) -> None:
    record(layout.name, "training")
    expected = alone(layout.moe, per_draw(layout))
    parallel = {"recompute": "full", **layout.parallel}
    file = write(layout.name, layout.moe, per_draw(layout), parallel)
    compare(ranks.run(training_jobs.trained, layout.world, str(file), timeout=240), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_sliced_steps_are_the_masked_ones_of_one_process(
    layout: Layout, write: Callable[..., Path], alone: Callable[..., Any], ranks: RankPool
) -> None:
    expected = alone(layout.moe, per_draw(layout), hard=True)
    sections = {**HARD, "stage": {**SEVERAL, "execution": "sliced"}}
    file = write(f"sliced_{layout.name}", layout.moe, per_draw(layout), dict(layout.parallel), **sections)
    compare(ranks.run(training_jobs.trained, layout.world, str(file), timeout=240), expected)


def compare(results: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """The run of some ranks is that of one process."""
    found = results[0]
    assert len(steps_of(found)) == len(steps_of(expected)) >= SLICED_STEPS
    for mine, theirs in zip(steps_of(found), steps_of(expected), strict=True):
        assert_same_losses(mine, theirs)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert mine["budget"] == theirs["budget"] and mine["lr"] == theirs["lr"]
    for name, weight in expected["router"].items():
        torch.testing.assert_close(found["router"][name], weight, rtol=0, atol=1e-5)
        # the same bits everywhere, whatever each rank saw
        assert all(torch.equal(other["router"][name], found["router"][name]) for other in results)
    realised, wanted = (
        [line["router"]["budgets"][b]["widths"] for line in run["lines"] if "router" in line for b in BUDGETS]
        for run in (found, expected)
    )
    assert realised == wanted != []
    evaluated, wanted = (
        [r for line in run["lines"] if "eval" in line for r in line["eval"]["submodels"].values()]
        for run in (found, expected)
    )
    assert [r["loss"] for r in evaluated] == pytest.approx([r["loss"] for r in wanted], rel=1e-5)
    assert [r["tokens"] for r in evaluated] == [r["tokens"] for r in wanted] != []


@pytest.mark.parametrize("name", ["TP2+SP", "PP2", "PP2+VPP2"])
def test_tied_embeddings_are_one_tensor_on_two_stages(
    name: str, write: Callable[..., Path], ranks: RankPool
) -> None:
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    runs = [
        ranks.run(training_jobs.trained, world, str(write(f"tied_{n}", False, 1, parallel, tied=True)))[0]
        for n, world, parallel in (("alone", 1, {}), (name, layout.world, dict(layout.parallel)))
    ]
    expected, found = ([line["loss"] for line in steps_of(run)] for run in runs)
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == STEPS


@pytest.mark.parametrize("name", ["TP2+SP+ETP1+EP2", "PP2", "DP2+overlap"])
def test_bf16_weights_have_fp32_main_parameters_and_one_router(
    name: str, write: Callable[..., Path], ranks: RankPool
) -> None:
    """The first step is that of one process to bf16 rounding; after ten the routers are still equal bit by bit."""
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    (expected,), found = (
        ranks.run(training_jobs.trained, world, str(write(f"bf16_{n}", True, 1, parallel, dtype="bf16")))
        for n, world, parallel in (("alone", 1, {}), (name, layout.world, dict(layout.parallel)))
    )
    assert steps_of(found[0])[0]["loss"] == pytest.approx(steps_of(expected)[0]["loss"], rel=2e-2)
    assert not any(line.get("skipped") for line in steps_of(found[0]))
    for n, weight in found[0]["router"].items():
        assert weight.dtype is torch.float32 and all(torch.equal(r["router"][n], weight) for r in found)


def test_the_comparison_notices_one_percent_of_a_learning_rate(
    write: Callable[..., Path], alone: Callable[..., Any], ranks: RankPool
) -> None:
    """Every budget is drawn and widths differ by layer; a gradient that is 1 % off would show."""
    expected = alone(True, 1)
    drawn = [line["budget"] for line in steps_of(expected)]
    assert {b for each in drawn for b in ([each] if isinstance(each, str) else each)} == set(BUDGETS)
    widths = [line["router"]["budgets"]["small"]["widths"] for line in expected["lines"] if "router" in line]
    assert any(isinstance(w, list) and len(set(w)) > 1 for w in widths[-1].values())
    for section, field, rate in (("optimizer", "lr", 2.02e-3), ("router", "lr", 2.02e-2)):
        sections = {"optimizer": OPTIMIZER, "router": ROUTER}
        sections[section] = {**sections[section], field: rate}
        (found,) = ranks.run(training_jobs.trained, 1, str(write(f"off_{section}", True, 1, {}, **sections)))
        last, other = steps_of(found)[-1], steps_of(expected)[-1]
        assert abs(last["loss"] / other["loss"] - 1) > 1e-4
        if section == "router":
            moved = [(w - found["router"][n]).abs().max() for n, w in expected["router"].items()]
            assert max(moved) > 1e-3
