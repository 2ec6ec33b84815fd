"""One micro-batch: sample the widths of its budget, run student and teacher, and return the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .. import runtime
from ..blocks import elastic_stack
from ..ops.kd import distillation_loss
from ..ops.mix import SubmodelMix
from ..ops.parallel import scale_gradient
from ..recipe import Recipe
from ..router import BudgetRouter, RouterStep, Schedule, budget_loss


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of one micro-batch ([b, s / context] each) and everything random about it."""

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    step: int
    budget: str | None
    key: tuple[int | str, ...]


class ForwardStep:
    """Megatron's ``forward_step_func``: micro-batch in; logits and the function that turns them to loss out.

    The loss is a sum over tokens, to be divided by the number of tokens of the global batch
    (``calculate_per_token_loss``): the result does not depend on micro-batching or layout. The router's loss
    is weighted by the micro-batch's tokens alike.

    Every rank of the world calls ``begin`` before the micro-batches of a step, and ``finish`` after them and
    before gradients are reduced over data-parallel ranks.

    Args:
        frozen: without a router, the widths of each budget.
    """

    def __init__(
        self,
        recipe: Recipe,
        router: BudgetRouter | None,
        total_steps: int,
        frozen: Mapping[str, SubmodelMix] | None = None,
    ):
        self.frozen = frozen or {}
        self.loss = recipe.loss
        self.settings = recipe.router
        self.router = router
        self.total_steps = total_steps
        self.groups = runtime.groups()
        tau, scale = recipe.router.tau, recipe.router.logit_scale
        self.tau = Schedule(tau.start, tau.end, geometric=True)
        self.scale = Schedule(scale.start, scale.end)
        self.router_step: RouterStep | None = None

    def temperatures(self, step: int) -> dict[str, float]:
        """Gumbel temperature and logit scale at a step of the whole run."""
        return {
            "tau": self.tau.at(step, self.total_steps),
            "logit_scale": self.scale.at(step, self.total_steps),
        }

    def begin(self) -> None:
        """Compute the router's logits of this step."""
        self.router_step = RouterStep(self.router) if self.router is not None else None

    def finish(self) -> None:
        """Give the router its gradient: the sum over the world, on one data-parallel rank (see ``RouterStep``)."""
        if self.router_step is not None:
            self.router_step.backward(torch.distributed.group.WORLD, contribute=self.groups.dp_cp.rank() == 0)
            self.router_step = None

    def __call__(
        self, iterator: Iterator[MicroBatch], model: nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        batch = next(iterator)
        context, router_loss = nullcontext(), None
        if self.router_step is not None and batch.budget is not None:
            budget = next(b for b in self.router_step.router.budgets if b.name == batch.budget)
            hard = self.settings.sampling == "hard"
            mix = self.router_step.mix(budget, key=batch.key, hard=hard, **self.temperatures(batch.step))
            router_loss, _ = budget_loss(
                mix,
                budget,
                dead_zone=self.settings.dead_zone,
                identity_weight=self.settings.identity_weight,
            )
            context = elastic_stack(model).running(mix)
        elif batch.budget in self.frozen:
            context = elastic_stack(model).running(self.frozen[batch.budget])
        with context:
            output = model(batch.tokens, batch.position_ids, None)
        logits, reference = output if isinstance(output, tuple) else (output, None)
        return logits, partial(self._loss, batch, reference, router_loss)

    def _loss(
        self, batch: MicroBatch, reference: Tensor | None, router_loss: Tensor | None, logits: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum over tokens, number of tokens, and the sums to log: the same on every tensor rank."""
        loss, kd = distillation_loss(
            logits,
            reference,
            batch.labels,
            kind=self.loss.kind,
            temperature=self.loss.temperature,
            ce_weight=self.loss.ce_weight,
            group=self.groups.tp,
        )
        tokens = batch.loss_mask.sum()
        total = (loss * batch.loss_mask).sum()
        sums = {"tokens": tokens, "loss": total}
        if kd is not None:
            sums["kd_loss"] = (kd * batch.loss_mask).sum()
        if router_loss is not None:
            # every tensor rank computes this term, so each takes its share of the gradient
            share = scale_gradient(router_loss.to(total.device), 1 / self.groups.tp.size())
            total = total + self.settings.loss_weight * share * tokens
            sums |= {"router_loss": router_loss * tokens, "loss": total}
        return total, tokens.to(torch.int), {name: value.detach() for name, value in sums.items()}
