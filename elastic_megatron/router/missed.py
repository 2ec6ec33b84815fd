"""Budgets that a family's widths miss, and the nearest widths that would meet them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..space import Budget, ElasticSpace, SubmodelSpec
from .loss import relative_cost, relative_target

TOLERATED, REFUSED = 0.02, 0.05


@dataclass(frozen=True)
class Missed:
    """A size whose cost is more than ``TOLERATED`` off its budget.

    Args:
        off: cost / target - 1.
        realized, target: as shares of the parent's cost.
        nearest: the size that is nearest to the budget within a few changes of ``spec``.
        nearest_off: as ``off``, of that size.
    """

    budget: Budget
    spec: SubmodelSpec
    off: float
    realized: float
    target: float
    nearest: SubmodelSpec
    nearest_off: float

    @property
    def refused(self) -> bool:
        """Is the size so far off that it is not what was asked for?"""
        return abs(self.off) > REFUSED

    def __str__(self) -> str:
        change = [f"{a}={self.nearest.at(a, 0)}" for a in self.nearest if self.nearest[a] != self.spec[a]]
        near = f"; with {' '.join(change)} it would be {self.nearest_off:+.1%} off" if change else ""
        return (
            f"size {self.budget.name} costs {self.realized:.1%} of the parent in {self.budget.metric}, {self.off:+.1%} "
            f"off its budget of {self.target:.1%}{near}"
        )


def missed(
    space: ElasticSpace, budgets: Iterable[Budget], submodels: Mapping[str, SubmodelSpec]
) -> list[Missed]:
    """The sizes of a family that miss their budgets, in the order of these."""
    found = []
    for budget in budgets:
        spec = submodels[budget.name]
        off = relative_cost(space, budget, spec) - 1
        if abs(off) > TOLERATED:
            near, target = nearest(space, budget, spec), relative_target(space, budget)
            near_off = relative_cost(space, budget, near) - 1
            found.append(Missed(budget, spec, off, target * (1 + off), target, near, near_off))
    return found


def nearest(space: ElasticSpace, budget: Budget, spec: SubmodelSpec) -> SubmodelSpec:
    """A size within ``TOLERATED`` of a budget, or as near as changes of one axis after another lead from ``spec``.

    A changed axis has one width in all layers. Each change is the one that leads nearest, so that there are few.
    """

    def off(candidate: SubmodelSpec) -> float:
        return abs(relative_cost(space, budget, candidate) - 1)

    best = spec
    while off(best) > TOLERATED:
        found = min(_neighbours(space, best), key=off, default=best)
        if off(found) >= off(best):
            break
        best = found
    return best


def _neighbours(space: ElasticSpace, spec: SubmodelSpec) -> Iterator[SubmodelSpec]:
    for axis in space.axes:
        for width in space.choices_of(axis):
            yield SubmodelSpec.of(spec.to_dict() | {axis: width})
