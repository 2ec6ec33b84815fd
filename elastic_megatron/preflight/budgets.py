"""Budgets that no submodel of the family can meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil, floor, log10
from pathlib import Path

from ..checkpoint.resolve import budgets
from ..cost import metric, sizes_of_parent, sizes_of_spec
from ..errors import UserError
from ..recipe import PlannedJob
from ..space import Budget
from .family import Family, Found


def budget_problems(job: PlannedJob, family: Family) -> Iterator[Found]:
    """A finding for each budget outside what the family spans; the router would train towards what is not there."""
    space, trained = family.space, job.recipe.job == "train" and not family.frozen
    for budget in budgets(job.recipe) if trained and space is not None else ():
        assert space is not None
        if budget.table is not None and not Path(budget.table).is_file():
            continue  # a finding of its own
        try:
            whole = float(metric(sizes_of_parent(family.shape), budget))
            least = float(metric(sizes_of_spec(space, space.smallest()), budget))
        except UserError as error:
            yield "error", f"budgets.{budget.name}: {error}"
            continue
        unit = whole if budget.unit == "ratio" else 1.0
        low, high = least / unit, whole / unit
        if budget.target < low:
            yield "warning", _said(budget, "below the smallest submodel", low, _rounded(low, ceil))
        elif budget.target > high:
            yield "warning", _said(budget, "above the whole model", high, _rounded(high, floor))


def _said(budget: Budget, where: str, bound: float, nearest: float) -> str:
    key = f"budgets.{budget.name}.target"
    return f"{key}={budget.target:g} is {where}, {bound:.4g} {budget.metric}; set {key}={nearest:g}"


def _rounded(value: float, towards: Callable[[float], int]) -> float:
    """To three digits, upwards or downwards."""
    step = 10.0 ** (floor(log10(value)) - 2)
    return towards(value / step) * step
