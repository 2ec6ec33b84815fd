"""One micro-batch: draw a budget, sample its widths, run student and teacher, and return the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import elastic_stack
from ..ops.kd import distillation_loss
from ..recipe import Recipe
from ..router import BudgetRouter, Schedule, budget_loss


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of one micro-batch ([b, s] each) and everything random about it."""

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
    """

    def __init__(
        self, recipe: Recipe, router: BudgetRouter | None, teacher: nn.Module | None, total_steps: int
    ):
        self.loss = recipe.loss
        self.settings = recipe.router
        self.router = router
        self.teacher = teacher
        self.total_steps = total_steps
        tau, scale = recipe.router.tau, recipe.router.logit_scale
        self.tau = Schedule(tau.start, tau.end, geometric=True)
        self.scale = Schedule(scale.start, scale.end)

    def temperatures(self, step: int) -> dict[str, float]:
        """Gumbel temperature and logit scale at a step of the whole run."""
        return {
            "tau": self.tau.at(step, self.total_steps),
            "logit_scale": self.scale.at(step, self.total_steps),
        }

    def __call__(self, iterator: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        context, router_loss = nullcontext(), None
        if self.router is not None and batch.budget is not None:
            budget = next(b for b in self.router.budgets if b.name == batch.budget)
            hard = self.settings.sampling == "hard"
            mix = self.router(budget, key=batch.key, hard=hard, **self.temperatures(batch.step))
            router_loss, _ = budget_loss(
                mix,
                budget,
                dead_zone=self.settings.dead_zone,
                identity_weight=self.settings.identity_weight,
            )
            context = elastic_stack(model).running(mix)
        with context:
            logits = model(batch.tokens, batch.position_ids, None)
        with torch.no_grad():
            reference = self.teacher(batch.tokens, batch.position_ids, None) if self.teacher else None

        def loss_func(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss, kd = distillation_loss(
                output,
                reference,
                batch.labels,
                kind=self.loss.kind,
                temperature=self.loss.temperature,
                ce_weight=self.loss.ce_weight,
            )
            tokens = batch.loss_mask.sum()
            total = (loss * batch.loss_mask).sum()
            sums = {"tokens": tokens.detach(), "loss": total.detach()}
            if kd is not None:
                sums["kd_loss"] = (kd.detach() * batch.loss_mask).sum()
            if router_loss is not None:
                total = total + self.settings.loss_weight * router_loss.to(total.device) * tokens
                sums["router_loss"] = router_loss.detach() * tokens
                sums["loss"] = total.detach()
            return total, tokens.to(torch.int), sums

        return logits, loss_func
