"""The router's loss: how far the expected cost of its mix is from the budget."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cost import metric, sizes_of_parent, sizes_of_spec
from ..ops.mix import SubmodelMix
from ..space import Budget, ElasticSpace, SubmodelSpec


def target_cost(space: ElasticSpace, budget: Budget) -> float:
    """The budget's target in the unit of its metric."""
    if budget.unit == "absolute":
        return budget.target
    return budget.target * float(metric(sizes_of_parent(space.parent), budget))


def relative_target(space: ElasticSpace, budget: Budget) -> float:
    """The budget's target as a fraction of the parent's cost."""
    return target_cost(space, budget) / float(metric(sizes_of_parent(space.parent), budget))


def relative_cost(space: ElasticSpace, budget: Budget, spec: SubmodelSpec) -> float:
    """Exact cost of a submodel over its target: 1.0 is on budget."""
    return float(metric(sizes_of_spec(space, spec), budget)) / target_cost(space, budget)


def budget_loss(
    mix: SubmodelMix, budget: Budget, *, dead_zone: float = 0.0, identity_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``|cost(mix) / target - 1|``, and the relative cost itself, detached (0-d tensors).

    Errors inside ``dead_zone`` are not penalised. For the full budget ``identity_weight`` adds that multiple
    of the summed mean squared distance to the largest choices (upstream's regulariser, weight 10).
    """
    cost = metric(mix.sizes(), budget) / target_cost(mix.space, budget)
    cost = cost if isinstance(cost, Tensor) else torch.tensor(float(cost))
    error = (cost - 1).abs()
    loss = torch.where(error > dead_zone, error, error.detach() * 0)
    if budget.full and identity_weight:
        for p in mix.probs.values():
            largest = torch.zeros_like(p)
            largest[..., 0] = 1
            loss = loss + identity_weight * (p - largest).square().mean()
    return loss, cost.detach()
