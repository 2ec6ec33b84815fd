"""One micro-batch: sample the widths of its budget, run student and teacher, and return the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import runtime
from ..blocks import SlicedModel, running
from ..ops.chunked_kd import Projection, chunked_distillation_loss
from ..ops.mix import SubmodelMix
from ..ops.parallel import scale_gradient
from ..ops.top_block import TopLogits
from ..recipe import Recipe
from ..router import BudgetRouter, RouterStep, Schedule, budget_loss
from .distill import DistilledChunk
from .teacher_cache import Lesson

LOGGED = ("tokens", "loss", "kd_loss", "router_loss")


@dataclass(frozen=True)
class MicroBatch:
    """Tokens of one micro-batch ([b, s / context] each) and everything random about it.

    Args:
        weight: of its loss.
        again: the tokens are those of the micro-batch before, for another budget: the teacher has seen them.
        sliced: run it on its submodel's widths, where its draw is one-hot.
        lesson: what the teacher's cache knows of its sequences, where there is one.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    step: int
    budget: str | None
    key: tuple[int | str, ...]
    weight: float = 1.0
    again: bool = False
    sliced: bool = False
    lesson: Lesson | None = None


class ForwardStep:
    """Megatron's ``forward_step_func``: micro-batch in; hidden states and the function that turns them to loss out.

    The loss is a sum over tokens, to be divided by the number of tokens of the global batch
    (``calculate_per_token_loss``): the result does not depend on micro-batching or layout. The router's loss
    is weighted by the micro-batch's tokens alike. Tokens that train several budgets count once.

    Every rank of the world calls ``begin`` before the micro-batches of a step, and ``finish`` after them and
    before gradients are reduced over data-parallel ranks.

    Args:
        frozen: without a router, the widths of each budget.
        submodels: of this rank's chunks, where micro-batches may be sliced.
    """

    def __init__(
        self,
        recipe: Recipe,
        router: BudgetRouter | None,
        total_steps: int,
        frozen: Mapping[str, SubmodelMix] | None = None,
        submodels: Sequence[SlicedModel] = (),
    ):
        self.frozen, self.submodels = frozen or {}, submodels
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
        """Compute the router's logits of this step, and have submodels read the weights of now."""
        for chunk in self.submodels:
            chunk.refresh()
        self.router_step = RouterStep(self.router) if self.router is not None else None

    def finish(self) -> None:
        """Give the router its gradient: the sum over the world, on one data-parallel rank (see ``RouterStep``).

        After it, submodels have handed over all that they counted.
        """
        if self.router_step is not None:
            self.router_step.backward(torch.distributed.group.WORLD, contribute=self.groups.dp_cp.rank() == 0)
            self.router_step = None
        for chunk in self.submodels:
            chunk.land()

    def __call__(
        self, iterator: Iterator[MicroBatch], model: nn.Module
    ) -> tuple[Tensor | Projection, Callable[[Projection], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        batch = next(iterator)
        mix, router_loss = self.frozen.get(batch.budget or ""), None
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
        with _running(model, mix, batch):
            output = model(batch.tokens, batch.position_ids, None)
        student, reference = output if isinstance(output, tuple) else (output, None)
        return student, partial(self._loss, batch, reference, router_loss)

    def _loss(
        self,
        batch: MicroBatch,
        reference: Projection | TopLogits | None,
        router_loss: Tensor | None,
        student: Projection,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum over tokens, number of tokens, and the sums to log: the same on every tensor rank."""
        total, kd = chunked_distillation_loss(
            student,
            reference,
            batch.labels,
            batch.loss_mask,
            kind=self.loss.kind,
            temperature=self.loss.temperature,
            ce_weight=self.loss.ce_weight,
            group=self.groups.tp,
            chunk=self.loss.chunk,
            recompute=self.loss.recompute,
        )
        tokens = batch.loss_mask.sum()
        counted = torch.zeros_like(tokens) if batch.again else tokens
        total = total * batch.weight
        sums = {"tokens": counted, "loss": total}
        if kd is not None:
            sums["kd_loss"] = kd * batch.weight
        if router_loss is not None:
            # every tensor rank computes this term, so each takes its share of the gradient
            share = scale_gradient(router_loss.to(total.device), 1 / self.groups.tp.size())
            weighted = tokens * batch.weight
            total = total + self.settings.loss_weight * share * weighted
            sums |= {"router_loss": router_loss * weighted, "loss": total}
        return total, counted.to(torch.int), {name: value.detach() for name, value in sums.items()}


def reduced(
    outputs: Sequence[Mapping[str, Tensor]], flags: Sequence[float], device: torch.device
) -> tuple[dict[str, float], list[float]]:
    """Per-token means of what micro-batches log, over the global batch, and the sums of ``flags`` over all ranks.

    Args:
        outputs: of this rank's micro-batches; only the last pipeline stage has any, and its tensor ranks the same.
    """
    counted = outputs if runtime.groups().tp.rank() == 0 else []
    sums = torch.zeros(len(LOGGED) + len(flags), dtype=torch.float64, device=device)
    for i, name in enumerate(LOGGED):
        for output in counted:
            sums[i] += output.get(name, 0.0)
    sums[len(LOGGED) :] = torch.tensor(flags)
    torch.distributed.all_reduce(sums)
    found = sums.tolist()
    tokens, *means = found[: len(LOGGED)]
    # without a token there is no mean
    per_token = {n: v / tokens if tokens else math.nan for n, v in zip(LOGGED[1:], means, strict=True)}
    return per_token, found[len(LOGGED) :]


def _running(model: Any, mix: SubmodelMix | None, batch: MicroBatch) -> AbstractContextManager[None]:
    """Context in which forward passes of a chunk run a mix, or all of it, through whatever wraps it."""
    while hasattr(model, "module") and not isinstance(model, DistilledChunk):
        model = model.module
    mix = None if mix is None else mix.weighted(batch.weight)
    if isinstance(model, DistilledChunk):
        sliced = batch.sliced and mix is not None and mix.hard
        return model.running(mix, sliced=sliced, again=batch.again, lesson=batch.lesson)
    return nullcontext() if mix is None else running(model, mix)
