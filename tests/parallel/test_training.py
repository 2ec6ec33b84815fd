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
from runs import BUDGETS, OPTIMIZER, ROUTER, STEPS, per_draw


@pytest.fixture(scope="session")
def alone(write: Callable[..., Path], ranks: RankPool) -> Callable[[bool, int], dict[str, Any]]:
    """The run in one process, by model and draws."""
    found: dict[tuple[bool, int], dict[str, Any]] = {}

    def run(moe: bool, per_draw: int) -> dict[str, Any]:
        if (moe, per_draw) not in found:
            file = write(f"alone_{moe}_{per_draw}", moe, per_draw, {"recompute": "full"})
            (found[moe, per_draw],) = ranks.run(training_jobs.trained, 1, str(file), timeout=240)
        return found[moe, per_draw]

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
    results = ranks.run(training_jobs.trained, layout.world, str(file), timeout=240)
    found = results[0]
    assert len(steps_of(found)) == STEPS
    for mine, theirs in zip(steps_of(found), steps_of(expected), strict=True):
        for key in ("loss", "kd_loss", "router_loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-7), (theirs["step"], key)
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
    losses, others = (
        [r["loss"] for line in run["lines"] if "eval" in line for r in line["eval"]["submodels"].values()]
        for run in (found, expected)
    )
    assert losses == pytest.approx(others, rel=1e-5) and losses


def test_the_comparison_notices_one_percent_of_a_learning_rate(
    write: Callable[..., Path], alone: Callable[..., Any], ranks: RankPool
) -> None:
    """Every budget is drawn and widths differ by layer; a gradient that is 1 % off would show."""
    expected = alone(True, 1)
    assert {b for line in steps_of(expected) for b in line["budget"]} == set(BUDGETS)
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
