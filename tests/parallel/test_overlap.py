"""Parameters that are gathered while others are computed: asked for in one order, waited for where they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import overlap_jobs
import pytest
import torch
from pool import RankPool
from runs import BATCH, LENGTH, OPTIMIZER, ROUTER

STEPS = 3
STAGE = {"budgets_per_batch": 2, "tokens": STEPS * BATCH * LENGTH}
# hard draws run submodels, soft ones the whole model under masks
MODES = {"sliced": "hard", "masked": "soft"}


@pytest.fixture(scope="module", params=MODES)
def runs(
    request: pytest.FixtureRequest, write: Callable[..., Path], ranks: RankPool
) -> tuple[str, list[dict[str, Any]], list[dict[str, Any]]]:
    """Execution, and both ranks of a run whose parameters come late and of one that does not overlap."""
    sections = {
        "router": {**ROUTER, "sampling": MODES[request.param]},
        "stage": STAGE,
        # norms are summed bucket by bucket, and their rounding would reach every weight
        "optimizer": {**OPTIMIZER, "clip_grad": 0},
    }
    found = []
    for overlap in (True, False):
        file = write(f"late_{request.param}_{overlap}", True, 2, {"overlap": overlap}, **sections)
        found.append(ranks.run(overlap_jobs.trained, 2, str(file), delayed=overlap, timeout=240))
    return request.param, found[0], found[1]


def test_late_parameters_change_nothing(runs: Any) -> None:
    """Bit by bit: whoever reads a parameter has waited for it, or would have read what is no number."""
    _, late, plain = runs
    for mine, theirs in zip(late, plain, strict=True):
        assert all(torch.equal(mine["router"][n], theirs["router"][n]) for n in theirs["router"])
    losses = [[line["loss"] for line in run[0]["lines"] if "loss" in line] for run in (late, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == STEPS


def steps_of(events: list[Any]) -> list[list[Any]]:
    """Events of each step, which begins where parameters are asked for after something was computed."""
    steps: list[list[Any]] = [[]]
    for event in events:
        if event[0] == "ask" and steps[-1] and steps[-1][-1][0] != "ask":
            steps.append([])
        steps[-1].append(event)
    return steps


def test_ranks_ask_in_one_order_whatever_they_run(runs: Any) -> None:
    _, late, _ = runs
    asked = [[e for e in run["events"] if e[0] == "ask"] for run in late]
    buckets = {number for _, number in asked[0]}
    assert asked[0] == asked[1] and len(buckets) > 6 and len(asked[0]) == STEPS * len(buckets)


def test_a_parameter_is_waited_for_where_it_is_read(runs: Any) -> None:
    """The first module is done before any but its own bucket is waited for, and so on to the last."""
    mode, late, _ = runs
    steps = steps_of(late[0]["events"])
    assert len(steps) == STEPS
    for events in steps:
        kinds = [kind for kind, _ in events]
        first, waits = kinds.index("done"), [i for i, kind in enumerate(kinds) if kind == "wait"]
        asked = kinds.count("ask")
        assert kinds[:asked] == ["ask"] * asked == ["ask"] * len(waits), (
            "all are asked for first, and each arrives"
        )
        assert sum(i < first for i in waits) == 1, mode
        assert events[waits[0]][1] == events[0][1], "what is read first is asked for first"
        assert sum(kind == "done" for kind in kinds[first : waits[-1]]) > asked / 2, mode
