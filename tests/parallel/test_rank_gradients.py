"""Gradients of one step in fp64: the router's on every layout, the weights' with and without recomputation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradient_jobs
import pytest
from layouts import LAYOUTS, Layout
from pool import RankPool
from runs import per_draw
from torch import Tensor

RECOMPUTED = [
    layout
    for layout in LAYOUTS
    if layout.name in ("PP2", "PP2+VPP2", "CP2", "TP2+SP+ETP1+EP2", "TP2+SP+ETP1+EP2+PP2")
]


@pytest.fixture(scope="module")
def gradients(
    write: Callable[..., Path], ranks: RankPool
) -> Callable[..., list[dict[str, dict[str, Tensor]]]]:
    def of(layout: Layout | None, moe: bool, draw: int, recompute: bool = False) -> Any:
        name = f"gradients_{layout.name if layout else 'alone'}_{moe}_{draw}"
        parallel = {} if layout is None else {**layout.parallel, "recompute": "none"}
        # the full budget is the parent and leaves the router alone
        probs = {"full": 0, "medium": 0.5, "small": 0.5} if draw > 1 else "uniform"
        file = write(name, moe, draw, parallel, stage={"budget_probs": probs})
        world = layout.world if layout else 1
        return ranks.run(gradient_jobs.gradients, world, str(file), moe, recompute, timeout=240)

    return of


@pytest.fixture(scope="module")
def alone(gradients: Callable[..., Any]) -> Callable[[bool, int], dict[str, Tensor]]:
    found: dict[tuple[bool, int], dict[str, Tensor]] = {}

    def of(moe: bool, draw: int) -> dict[str, Tensor]:
        if (moe, draw) not in found:
            found[moe, draw] = gradients(None, moe, draw)[0]["logits"]
        return found[moe, draw]

    return of


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, float]:
    """Relative to the tensor, none counting as smaller than a millionth of the largest."""
    assert a.keys() == b.keys()
    scale = 1e-6 * max(float(v.norm()) for v in b.values())
    return {n: float((a[n] - b[n]).norm()) / max(float(b[n].norm()), scale) for n in b}


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_what_the_ranks_see_of_the_routers_gradient_adds_up_to_the_whole(
    layout: Layout, gradients: Callable[..., Any], alone: Callable[..., Any], record: Any
) -> None:
    """For every axis, shared between ranks or not, and every term: distillation, budget and load balance."""
    record(layout.name, "training")
    draw = per_draw(layout)
    whole = alone(layout.moe, draw)
    used = [n for n, g in whole.items() if g.any()]
    assert {n.split(".")[1] for n in used} == {n.split(".")[1] for n in whole}
    for rank in gradients(layout, layout.moe, draw):
        assert max(distance(rank["logits"], whole).values()) < 1e-9


@pytest.mark.parametrize("layout", RECOMPUTED, ids=lambda layout: layout.name)
def test_recomputation_changes_no_gradient_with_several_budgets_in_flight(
    layout: Layout, gradients: Callable[..., Any]
) -> None:
    """Weights and router; upstream's masks are those of the last micro-batch by then."""
    kept, recomputed = (gradients(layout, layout.moe, 1, recompute=r) for r in (False, True))
    for mine, theirs in zip(recomputed, kept, strict=True):
        assert mine["weights"] and max(distance(mine["weights"], theirs["weights"]).values()) < 1e-12
        assert max(distance(mine["logits"], theirs["logits"]).values()) < 1e-12
