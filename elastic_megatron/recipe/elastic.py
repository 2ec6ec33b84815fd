"""What makes a run elastic: the search space, the budgets, the ranking and the budget router."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from elastic_megatron.recipe.types import (
    Axis,
    FilePath,
    Key,
    Positive,
    PositiveFloat,
    Problem,
    Rate,
    Section,
    Switch,
    raise_any,
)
from elastic_megatron.space.space import GLOBAL_AXES


class Space(Section):
    """The widths that submodels may have. Legality against the model is checked by `elastic_megatron.space`."""

    choices: dict[Axis, tuple[Positive, ...]] = Field(
        default={}, description="Axis -> the sizes it may take; axes not named stay at the parent's size."
    )
    lanes: dict[Axis, Positive] = Field(
        default={},
        description="Axis -> equal blocks its sorted components are dealt to (a multiple of TP or EP).",
    )
    granule: dict[Axis, Positive] = Field(
        default={},
        description="Axis -> every size must be a multiple of this (quantisation block, kernel tile).",
    )
    per_layer: tuple[Axis, ...] = Field(
        default=(), description="Axes whose size may differ from layer to layer."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        raise_any([*self._choices(), *self._without_choices(), *self._per_layer()])
        return self

    def _choices(self) -> Iterator[Problem]:
        for axis, sizes in self.choices.items():
            if not sizes:
                yield Problem(("choices", axis), "needs at least one size")
            repeated = sorted({size for size in sizes if sizes.count(size) > 1})
            if repeated:
                yield Problem(("choices", axis), f"names {', '.join(map(str, repeated))} more than once")

    def _without_choices(self) -> Iterator[Problem]:
        for field in ("lanes", "granule"):
            for axis in getattr(self, field):
                if axis not in self.choices:
                    text = f"has no effect: {axis} has no sizes in space.choices"
                    yield Problem((field, axis), text)

    def _per_layer(self) -> Iterator[Problem]:
        for position, axis in enumerate(self.per_layer):
            if axis in GLOBAL_AXES:
                yield Problem(("per_layer", position), f"{axis} is one choice for the whole model")
            elif axis not in self.choices:
                yield Problem(("per_layer", position), f"{axis} has no sizes in space.choices")


class BudgetBase(Section):
    """What every budget has."""

    discriminator: ClassVar[str] = "metric"

    target: PositiveFloat = Field(description="The size that the submodel should have, in `unit`.")
    unit: Literal["ratio", "absolute"] = Field(
        default="ratio",
        description="ratio: fraction of the parent; absolute: parameters, bytes or seconds.",
    )

    @model_validator(mode="after")
    def _ratio(self) -> Self:
        if self.unit == "ratio" and self.target > 1:
            text = f"{self.target:g} is more than the whole parent (1); for a size write unit: absolute"
            raise_any([Problem(("target",), text)])
        return self


class ParameterBudget(BudgetBase):
    """A number of parameters."""

    metric: Literal["active_params", "total_params"] = Field(
        description="active_params: the parameters that one token uses; total_params: all of them."
    )


class MemoryBudget(BudgetBase):
    """Bytes resident while decoding: weights, KV cache and SSM state."""

    metric: Literal["memory_bytes"] = Field(description="Bytes resident while decoding.")
    format: Literal["bf16", "fp8", "nvfp4"] = Field(
        default="bf16", description="Format of the deployed weights."
    )
    sequence_length: Positive = Field(description="Tokens in each sequence's cache.")
    batch_size: Positive = Field(default=1, description="Sequences decoded together.")


class LatencyBudget(BudgetBase):
    """A time, looked up in a measured table."""

    metric: Literal["latency"] = Field(description="Time by a measured table.")
    table: FilePath = Field(description="File of measured times.")


Budget = Annotated[ParameterBudget | MemoryBudget | LatencyBudget, Field(discriminator="metric")]
Budgets = dict[Key, Budget]


class Rank(Section):
    """The calibration pass that scores every component."""

    samples: Positive = Field(default=1024, description="Calibration sequences.")
    seq_length: Positive = Field(default=8192, description="Tokens per calibration sequence.")
    micro_batch_size: Positive = Field(default=1, description="Sequences per forward pass.")
    depth: Switch = Field(default=False, description="Rank layers too: one further pass per layer left out.")


class GumbelTau(Section):
    """Temperature of the Gumbel-softmax, geometric over the run."""

    start: PositiveFloat = Field(default=1.0, description="At the first step.")
    end: PositiveFloat = Field(default=0.05, description="At the last step.")


class LogitScale(Section):
    """Factor on the router's logits, linear over the run."""

    start: PositiveFloat = Field(default=1.0, description="At the first step.")
    end: PositiveFloat = Field(default=10.0, description="At the last step.")


class Router(Section):
    """The budget router: one small network per axis, from the budget to probabilities over its sizes."""

    inner_size: Positive = Field(default=256, description="Hidden width of each network.")
    tau: GumbelTau = Field(default=GumbelTau(), description="Gumbel-softmax temperature.")
    logit_scale: LogitScale = Field(default=LogitScale(), description="Factor on the logits.")
    frozen: Switch | None = Field(
        default=None,
        description="true: train the submodels of model.checkpoint at the widths they have; nothing is sampled, and "
        "the router has no loss. Default: true where there is a section quantize.",
    )
    sampling: Literal["soft", "hard"] = Field(
        default="soft", description="soft: train on mixtures of sizes; hard: on one sampled size at a time."
    )
    lr: PositiveFloat = Field(default=1e-2, description="Peak learning rate of the router.")
    loss_weight: Rate = Field(default=1.0, description="Weight of the budget loss (lambda).")
    dead_zone: Rate = Field(default=0.0, description="Relative budget error that costs nothing.")
    identity_weight: Rate = Field(
        default=10.0, description="Weight of the pull towards full widths at the full budget (ratio 1)."
    )
    pin_full: Switch = Field(
        default=True,
        description="The full budget (ratio 1) always runs the whole parent instead of a sample.",
    )
    init_std: PositiveFloat = Field(default=0.1, description="Standard deviation of the initial weights.")
    accept_missed_budgets: Switch = Field(
        default=False,
        description="true: a size that costs 5 % more or less than its budget when training ends is no error.",
    )
