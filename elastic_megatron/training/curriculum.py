"""The curriculum as a function of the step: which stage, which learning rate, how many tokens so far."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..ops.gumbel import draw_several
from ..recipe import Recipe
from ..recipe.training import Optimizer, Stage, tokens_after


@dataclass(frozen=True)
class Place:
    """Where a step lies: its stage, and how much was consumed before it."""

    step: int
    stage: Stage
    stage_index: int
    step_in_stage: int
    samples: int
    tokens: int


@dataclass(frozen=True)
class Segment:
    """Consecutive stages under one learning-rate schedule; ``tokens_per_step`` are those of the first."""

    start: int
    steps: int
    peak_lr: float
    tokens_per_step: int


class Curriculum:
    """Pure functions of the step over a recipe's stages; nothing here is state to save."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.total_steps = recipe.total_steps

    def place(self, step: int) -> Place:
        """The place of a step (0-based, below ``total_steps``). ``samples`` count within the stage."""
        first = tokens = 0
        for index, stage in enumerate(self.recipe.stages):
            inside = step - first
            if inside < stage.steps:
                return Place(
                    step=step,
                    stage=stage,
                    stage_index=index,
                    step_in_stage=inside,
                    samples=inside * stage.global_batch_size,
                    tokens=tokens + inside * stage.tokens_per_step,
                )
            first, tokens = first + stage.steps, tokens + stage.steps * stage.tokens_per_step
        raise IndexError(step)

    def tokens_after(self, steps: int) -> int:
        """Tokens seen by the first ``steps`` steps."""
        return tokens_after(steps, self.recipe.stages)

    def segments(self) -> tuple[Segment, ...]:
        """Learning-rate schedules: a stage that names an ``lr`` begins its own, others continue the last."""
        out: list[Segment] = []
        first = 0
        for stage in self.recipe.stages:
            if not out or stage.lr is not None:
                peak = stage.lr or self.recipe.optimizer.lr
                out.append(Segment(first, stage.steps, peak, stage.tokens_per_step))
            else:
                out[-1] = replace(out[-1], steps=out[-1].steps + stage.steps)
            first += stage.steps
        return tuple(out)

    def segment(self, step: int) -> Segment:
        return next(s for s in reversed(self.segments()) if s.start <= step)

    def unit(self, place: Place, sample: int) -> int:
        """Which draw of the step a micro-batch belongs to, by its first sample within the step.

        A function of the recipe alone: neither micro-batching nor the parallel layout moves a draw.
        """
        return sample // place.stage.draw_size

    def draw_budgets(self, place: Place, unit: int) -> list[tuple[str, float]]:
        """The budgets of one draw and the weights of their losses: a function of (seed, step, unit) alone."""
        probs = self.recipe.budget_probabilities(place.stage)
        key = (self.recipe.seed, "budget", place.step, unit)
        drawn = draw_several(key, tuple(probs.values()), place.stage.budgets_per_batch)
        return [(tuple(probs)[index], weight) for index, weight in drawn]


class LearningRate:
    """Megatron's ``OptimizerParamScheduler``, one per segment of the curriculum, as a function of the step.

    The router's parameter groups follow the same shape from their own peak. A segment's peak enters as a
    factor on the learning rate, not in the groups' ``max_lr``: that is part of the key by which Megatron
    finds a group in a checkpoint.
    """

    def __init__(self, optimizer: Any, settings: Optimizer, curriculum: Curriculum) -> None:
        self.optimizer, self.settings, self.curriculum = optimizer, settings, curriculum
        self.segment: Segment | None = None

    def set(self, step: int) -> float:
        """Set the learning rates that step ``step`` uses (0-based) and return the model's."""
        segment = self.curriculum.segment(step)
        if segment != self.segment:
            self.segment, self.scheduler = segment, self._scheduler(segment)
        self.scheduler.step(step + 1 - segment.start - self.scheduler.num_steps)
        rate = 0.0
        for group in self.optimizer.param_groups:
            if group["default_config"]:
                group["lr"] *= segment.peak_lr / self.settings.lr
                rate = float(group["lr"])
        return rate

    def _scheduler(self, segment: Segment) -> Any:
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        o = self.settings
        warmup = o.warmup(segment.tokens_per_step)
        steps = max(segment.steps, warmup + 1)
        return OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=o.lr,
            min_lr=o.min_lr,
            lr_warmup_steps=warmup,
            lr_decay_steps=steps,
            lr_decay_style="WSD" if o.schedule == "wsd" else o.schedule,
            start_wd=o.weight_decay,
            end_wd=o.weight_decay,
            wd_incr_steps=steps,
            wd_incr_style="constant",
            wsd_decay_steps=max(1, round(steps * o.wsd_decay_fraction)),
            lr_wsd_decay_style="linear",
        )
