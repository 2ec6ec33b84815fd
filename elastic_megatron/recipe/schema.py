"""`Recipe`, the one object that describes a run."""

from typing import Literal, Self

from pydantic import Field, model_validator

from elastic_megatron.recipe import checks
from elastic_megatron.recipe.deploy import Export, Quantize
from elastic_megatron.recipe.elastic import Budgets, Rank, Router, Space
from elastic_megatron.recipe.model import Model
from elastic_megatron.recipe.objective import Loss, Teacher
from elastic_megatron.recipe.slurm import Slurm
from elastic_megatron.recipe.training import (
    Checkpoint,
    Data,
    Log,
    Optimizer,
    Parallel,
    Stage,
)
from elastic_megatron.recipe.types import Count, FilePath, Name, Section, raise_any


class Recipe(Section):
    """A whole run. Immutable and free of torch; all paths are absolute."""

    name: Name = Field(description="Name of the run.")
    job: Literal["train", "rank", "quantize", "export"] = Field(
        default="train", description="The command that `submit` runs with this recipe."
    )
    seed: Count = Field(
        default=1234, description="Seed of weights, data order, budget draws and router noise."
    )
    model: Model = Field(description="The parent.")
    data: Data = Field(default=Data(), description="Token streams.")
    space: Space = Field(default=Space(), description="The widths that submodels may have.")
    budgets: Budgets = Field(
        default={}, description="Submodel name -> the size it should have; empty: no router."
    )
    rank: Rank = Field(default=Rank(), description="The calibration pass.")
    router: Router = Field(default=Router(), description="The budget router.")
    optimizer: Optimizer = Field(default=Optimizer(), description="AdamW and the learning-rate schedule.")
    stages: tuple[Stage, ...] = Field(default=(), description="The curriculum, in order.")
    stop_after: Name | None = Field(
        default=None,
        description="Stage after which `train` ends, complete; schedules run over all stages, so that another "
        "job can go on there as if nothing had been between.",
    )
    teacher: Teacher = Field(default=Teacher(), description="The frozen model that is distilled.")
    loss: Loss = Field(default=Loss(), description="The training objective.")
    parallel: Parallel = Field(default=Parallel(), description="Sizes of the parallel groups.")
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="When to save.")
    log: Log = Field(default=Log(), description="When to report.")
    quantize: Quantize | None = Field(default=None, description="Low-precision weights and activations.")
    export: Export | None = Field(default=None, description="What the export job writes.")
    slurm: Slurm = Field(default=Slurm(), description="What the job asks for.")
    run_dir: FilePath = Field(description="Folder for everything that the run writes.")

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        raise_any(checks.run({name: getattr(self, name) for name in type(self).model_fields}))
        return self

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def last_step(self) -> int:
        """Optimiser steps after which this job is complete: all of them, or those up to `stop_after`."""
        steps = 0
        for stage in self.stages:
            steps += stage.steps
            if stage.name == self.stop_after:
                break
        return steps

    @property
    def router_frozen(self) -> bool:
        """Do the submodels keep the widths that `model.checkpoint` has for them?"""
        frozen = self.quantize is not None if self.router.frozen is None else self.router.frozen
        return bool(self.budgets) and frozen

    def budget_probabilities(self, stage: Stage) -> dict[str, float]:
        """Probability of every budget in `stage`, in the order of `budgets`; they sum to 1 (or none)."""
        if isinstance(stage.budget_probs, str):
            return dict.fromkeys(self.budgets, 1 / max(1, len(self.budgets)))
        return {name: stage.budget_probs.get(name, 0.0) for name in self.budgets}
