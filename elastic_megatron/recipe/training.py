"""Data, optimiser, stages and the other sections of an ordinary training run."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from elastic_megatron.recipe.types import (
    Count,
    FilePath,
    Fraction,
    Key,
    Name,
    Positive,
    PositiveFloat,
    Problem,
    Rate,
    Section,
    Switch,
    raise_any,
)


class DataSource(Section):
    """One tokenised corpus of a blend."""

    path: FilePath = Field(description="Prefix of the .bin and .idx files.")
    weight: PositiveFloat = Field(description="Share of the blend, relative to the other sources.")


class Data(Section):
    """Token streams."""

    train: tuple[DataSource, ...] = Field(default=(), description="Blend to train and calibrate on.")
    valid: tuple[DataSource, ...] = Field(
        default=(), description="Blend to evaluate on; empty for no evaluation."
    )
    cache: FilePath | None = Field(
        default=None, description="Directory for the sample indices of the blends."
    )


class Optimizer(Section):
    """AdamW and the learning-rate schedule."""

    lr: PositiveFloat = Field(default=1e-4, description="Peak learning rate of the model.")
    min_lr: Rate = Field(default=0.0, description="Learning rate at the end of the schedule.")
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), description="Adam's decay rates.")
    eps: PositiveFloat = Field(default=1e-8, description="Adam's epsilon.")
    weight_decay: Rate = Field(default=0.0, description="Decoupled weight decay.")
    clip_grad: Rate = Field(default=1.0, description="Largest gradient norm; 0 for no clipping.")
    schedule: Literal["cosine", "wsd", "constant", "linear"] = Field(
        default="cosine", description="Shape of the decay; wsd: warm-up, stable, decay."
    )
    warmup_steps: Count = Field(
        default=0, description="Steps of linear warm-up from 0, at the start of every schedule."
    )
    warmup_tokens: Count | None = Field(
        default=None,
        description="The same in tokens, in place of warmup_steps: as many steps of the stage where the schedule "
        "begins as see them.",
    )
    wsd_decay_fraction: Annotated[PositiveFloat, Field(le=1)] = Field(
        default=0.2, description="Share of the steps that decay (schedule wsd)."
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        text = "must be below 1"
        problems = [Problem(("betas", i), text) for i, beta in enumerate(self.betas) if beta == 1]
        if self.min_lr > self.lr:
            problems.append(Problem(("min_lr",), f"{self.min_lr:g} is above lr = {self.lr:g}"))
        if self.warmup_tokens is not None and self.warmup_steps:
            problems.append(Problem(("warmup_tokens",), _excludes("warmup_steps", self.warmup_steps)))
        raise_any(problems)
        return self

    def warmup(self, tokens_per_step: int) -> int:
        """Steps of warm-up of a schedule that begins in a stage of so many tokens a step."""
        if self.warmup_tokens is None:
            return self.warmup_steps
        return -(-self.warmup_tokens // tokens_per_step)


def _excludes(key: str, value: int) -> str:
    return f"says what {key} = {value} says; keep one: null removes an inherited key"


def _probs_kind(value: object) -> str:
    return "uniform" if isinstance(value, str) else "table"


BudgetProbs = Annotated[
    Annotated[Literal["uniform"], Tag("uniform")] | Annotated[dict[Key, Fraction], Tag("table")],
    Discriminator(_probs_kind),
]


class Stage(Section):
    """One phase of the curriculum: a context length, a batch size and the odds of each budget."""

    name: Name = Field(description="Name in logs and folders.")
    tokens: Positive = Field(description="Tokens to train on, rounded up to whole steps; 100e9 is fine.")
    seq_length: Positive = Field(description="Tokens per sequence.")
    global_batch_size: Positive = Field(description="Sequences per step, over all ranks.")
    micro_batch_size: Positive = Field(default=1, description="Sequences per forward pass of one rank.")
    samples_per_draw: Positive | None = Field(
        default=None,
        description="Consecutive sequences of a step that share one draw of budget and widths; "
        "default: micro_batch_size.",
    )
    budget_probs: BudgetProbs = Field(
        default="uniform",
        description="Budget -> probability of being drawn for a micro-batch; left out means 0.",
    )
    budgets_per_batch: Positive = Field(
        default=1,
        description="Different budgets that train on every micro-batch, for one pass of the teacher; weighted so that "
        "gradients are, on average, those of one budget drawn by budget_probs.",
    )
    execution: Literal["auto", "masked", "sliced"] = Field(
        default="auto",
        description="sliced: compute only the widths that a micro-batch draws, which must be hard or frozen; masked: "
        "all of them, cut ones times zero. The same numbers; auto: sliced wherever that is possible.",
    )
    lr: PositiveFloat | None = Field(
        default=None,
        description="Peak learning rate of a schedule that begins here; default: the last one goes on.",
    )

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step sees."""
        return self.seq_length * self.global_batch_size

    @property
    def draw_size(self) -> int:
        """Consecutive sequences of a step that share one draw of budget and widths."""
        return self.samples_per_draw or self.micro_batch_size

    @property
    def steps(self) -> int:
        """Optimiser steps: enough for `tokens`, the last one whole."""
        return -(-self.tokens // self.tokens_per_step)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if self.global_batch_size % self.micro_batch_size:
            text = f"{self.global_batch_size} is not a multiple of micro_batch_size = {self.micro_batch_size}"
            problems.append(Problem(("global_batch_size",), text))
        if self.draw_size % self.micro_batch_size:
            text = f"{self.draw_size} is not a multiple of micro_batch_size = {self.micro_batch_size}"
            problems.append(Problem(("samples_per_draw",), text))
        elif self.samples_per_draw is not None and self.global_batch_size % self.samples_per_draw:
            text = f"{self.global_batch_size} is not a multiple of samples_per_draw = {self.samples_per_draw}"
            problems.append(Problem(("global_batch_size",), text))
        if isinstance(self.budget_probs, dict):
            total = sum(self.budget_probs.values())
            if abs(total - 1) > 1e-6:
                text = f"probabilities must sum to 1, but they sum to {total:g}"
                problems.append(Problem(("budget_probs",), text))
        raise_any(problems)
        return self


def tokens_after(steps: int, stages: Sequence[Stage]) -> int:
    """Tokens that the first `steps` steps of a curriculum see."""
    tokens = 0
    for stage in stages:
        inside = min(steps, stage.steps)
        tokens, steps = tokens + inside * stage.tokens_per_step, steps - inside
    return tokens


class Parallel(Section):
    """Sizes of the parallel groups."""

    tensor: Positive = Field(default=1, description="Tensor-parallel ranks.")
    sequence: Switch = Field(
        default=False, description="Shard activations along the sequence (needs tensor > 1)."
    )
    expert: Positive = Field(default=1, description="Expert-parallel ranks.")
    expert_tensor: Positive | None = Field(
        default=None, description="Tensor-parallel ranks of the experts; default: tensor."
    )
    pipeline: Positive = Field(default=1, description="Pipeline stages.")
    virtual_pipeline: Annotated[Positive, Field(ge=2)] | None = Field(
        default=None, description="Model chunks per pipeline stage (needs pipeline > 1)."
    )
    context: Positive = Field(default=1, description="Context-parallel ranks.")
    world_size: Positive | None = Field(default=None, description="Ranks of the job; default: as launched.")
    distributed_timeout_minutes: Positive = Field(
        default=10,
        description="Minutes that a rank waits in a collective before the job ends; longer than the slowest rank's "
        "start, checkpoint or evaluation.",
    )
    distributed_optimizer: Switch = Field(
        default=True, description="Shard the optimizer over the data-parallel ranks."
    )
    overlap: Switch = Field(
        default=False,
        description="Overlap gradient reduction (and, with the distributed optimizer, parameter gathering) "
        "with computing.",
    )
    dispatcher: Literal["alltoall", "allgather", "flex"] = Field(
        default="alltoall",
        description="How tokens reach experts on other ranks; flex: by DeepEP's kernels, which must be installed.",
    )
    fused_experts: Switch = Field(
        default=True,
        description="On a GPU, fuse what surrounds the GEMMs of experts: permutation of tokens, squared ReLU with the "
        "router's weights.",
    )
    shared_expert_overlap: Switch = Field(
        default=False,
        description="Run shared experts while tokens travel, on a stream of their own; not with dispatcher allgather.",
    )
    recompute: Literal["none", "full"] = Field(
        default="none", description="full: keep only each layer's input and compute the rest again."
    )


class Checkpoint(Section):
    """When to save."""

    interval: Count = Field(default=0, description="Steps between checkpoints; 0: only at the end.")
    interval_tokens: Positive | None = Field(
        default=None,
        description="The same in tokens, in place of interval: after the step that completes each multiple, "
        "counted over all stages.",
    )
    keep_last: Positive = Field(default=2, description="Checkpoints to keep.")
    async_save: Switch = Field(
        default=False, description="Write checkpoints in the background while training goes on."
    )

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        if self.interval_tokens is not None and self.interval:
            raise_any([Problem(("interval_tokens",), _excludes("interval", self.interval))])
        return self

    def due(self, step: int, stages: Sequence[Stage]) -> bool:
        """Is a checkpoint saved after step `step` (from 1) of the curriculum? The last one of a job always is."""
        if self.interval_tokens is not None:
            before, after = (tokens_after(n, stages) // self.interval_tokens for n in (step - 1, step))
            return after > before
        return self.interval > 0 and step % self.interval == 0


class Log(Section):
    """When to report."""

    interval: Positive = Field(default=10, description="Steps between log lines.")
    eval_interval: Count = Field(default=0, description="Steps between evaluations; 0: only at the end.")
    eval_tokens: Positive = Field(default=65536, description="Tokens per evaluation of one budget.")
    tensorboard: Switch = Field(default=True, description="Write TensorBoard files.")
