"""The micro-batches of a step on this rank, and the windows of an evaluation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from .. import runtime
from ..data import blend
from ..ops.parallel import zigzag
from ..recipe import Recipe
from .curriculum import Curriculum, Place
from .datasets import check_tokens, dataset
from .step import MicroBatch


class Batches:
    """Pure functions of the step; the data set of one stage at a time is kept open."""

    def __init__(self, curriculum: Curriculum, vocab_size: int, device: torch.device) -> None:
        self.curriculum, self.recipe = curriculum, curriculum.recipe
        self.vocab_size, self.device = vocab_size, device
        self.datasets: dict[int, Any] = {}

    def of_step(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches, cut for context parallelism.

        Raises ``UserError`` where a token has no embedding.
        """
        place, groups = self.curriculum.place(step), runtime.groups()
        stage, rank, ranks, context = place.stage, groups.dp.rank(), groups.dp.size(), groups.cp
        samples, out = self._dataset(place.stage_index), []
        for m in range(stage.global_batch_size // (stage.micro_batch_size * ranks)):
            batch = blend.batch(
                samples, place.samples, micro_batch_size=stage.micro_batch_size, dp_rank=rank, dp_size=ranks,
                microbatch=m,
            )  # fmt: skip
            check_tokens(batch["tokens"], self.vocab_size)
            local = {k: zigzag(v, 1, context.rank(), context.size()) for k, v in batch.items()}
            unit = self.curriculum.unit(place, (m * ranks + rank) * stage.micro_batch_size)
            out.append(
                MicroBatch(
                    **{k: v.to(self.device) for k, v in local.items()},
                    step=step,
                    budget=self.curriculum.draw_budget(place, unit) if self.recipe.budgets else None,
                    key=(self.recipe.seed, "gumbel", step, unit),
                )
            )
        return out

    def budgets(self, place: Place) -> str | dict[str, int]:
        """The budgets of a step's micro-batches on all ranks: a name, or how many each had."""
        stage = place.stage
        samples = range(0, stage.global_batch_size, stage.micro_batch_size)
        drawn = Counter(self.curriculum.draw_budget(place, self.curriculum.unit(place, s)) for s in samples)
        return next(iter(drawn)) if len(drawn) == 1 else dict(drawn)

    def _dataset(self, index: int) -> Any:
        if index not in self.datasets:
            stage = self.recipe.stages[index]
            self.datasets = {
                index: dataset(
                    self.recipe,
                    self.recipe.data.train,
                    seq_length=stage.seq_length,
                    num_samples=stage.steps * stage.global_batch_size,
                    stage=index,
                )
            }
        return self.datasets[index]


def eval_windows(recipe: Recipe) -> list[Tensor]:
    """The first ``eval_tokens`` tokens of ``data.valid`` in windows of the first stage's length."""
    if not recipe.data.valid:
        return []
    length = recipe.stages[0].seq_length
    count = max(1, recipe.log.eval_tokens // length)
    valid = dataset(recipe, recipe.data.valid, seq_length=length, num_samples=count)
    return [torch.as_tensor(valid[i]["tokens"]) for i in range(min(count, len(valid)))]
