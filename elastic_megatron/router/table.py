"""The router's state as plain values, for logs and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..space import SubmodelSpec
from .loss import budget_loss, relative_cost, relative_target
from .router import BudgetRouter


def router_line(
    router: BudgetRouter, submodels: Mapping[str, SubmodelSpec], step: int, *, tau: float, logit_scale: float
) -> dict[str, Any]:
    """Probabilities, chosen widths, and expected and realised cost of every budget.

    Costs and targets are fractions of the parent's cost in the budget's own metric.
    """
    lines = {}
    for budget in router.budgets:
        mix = router.probabilities(budget, logit_scale)
        target = relative_target(router.space, budget)
        lines[budget.name] = {
            "cost": float(budget_loss(mix, budget)[1]) * target,
            "realised": relative_cost(router.space, budget, submodels[budget.name]) * target,
            "target": target,
            "widths": submodels[budget.name].to_dict(),
            "probs": {a: p.tolist() for a, p in mix.probs.items()},
        }
    choices = {a: list(router.space.choices_of(a)) for a in router.space.axes}
    return {"step": step, "tau": tau, "logit_scale": logit_scale, "budgets": lines, "choices": choices}
