"""The router's part of one optimiser step, on however many ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.gumbel import Key
from ..ops.mix import SubmodelMix
from ..space import Budget
from .router import BudgetRouter


class RouterStep:
    """The logits of every budget, computed once, and the gradient that the step's micro-batches leave on them.

    Micro-batches sample from leaves that are cut off from the router. After the last one ``backward`` sums the
    leaves' gradients over ranks and carries them through the router: so every parameter gets its gradient
    once a step, also where no micro-batch used it, the sum is one small message, and no rank's router can
    drift from another's.
    """

    def __init__(self, router: BudgetRouter) -> None:
        self.router = router
        self.logits = {b.name: router.logits(b) for b in router.budgets}
        self.leaves = {
            name: {axis: v.detach().requires_grad_() for axis, v in logits.items()}
            for name, logits in self.logits.items()
        }

    def mix(self, budget: Budget, *, key: Key, tau: float, logit_scale: float, hard: bool) -> SubmodelMix:
        """Sample the mix of a micro-batch; ``key`` determines the noise."""
        return self.router.sample(
            self.leaves[budget.name], budget, key=key, tau=tau, logit_scale=logit_scale, hard=hard
        )

    def backward(self, group: Any = None, *, contribute: bool = True) -> None:
        """Differentiate the router.

        Args:
            group: sum over its ranks first.
            contribute: whether this rank's parameters get that sum. A later reduction over data-parallel
                ranks adds theirs up: where one of them contributes and the others add zeros, its result is
                the sum bit by bit, in whatever order it adds.
        """
        pairs = [(self.logits[n][a], leaf) for n, leaves in self.leaves.items() for a, leaf in leaves.items()]
        logits = [value for value, _ in pairs]
        parts = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for _, leaf in pairs]
        total = torch.cat([part.flatten() for part in parts])
        if group is not None:
            torch.distributed.all_reduce(total, group=group)
        if not contribute:
            total = torch.zeros_like(total)
        torch.autograd.backward(logits, _split_like(total, logits))


def _split_like(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]
