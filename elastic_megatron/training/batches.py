"""The micro-batches of a step on this rank, and the windows of an evaluation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import runtime
from ..data import blend
from ..errors import UserError
from ..ops.parallel import zigzag
from ..recipe import Recipe
from ..recipe.deploy import Quantize
from ..recipe.training import Stage
from .curriculum import Curriculum, Place
from .datasets import check_tokens, dataset
from .step import MicroBatch
from .teacher_cache import TeacherCache


class Batches:
    """Pure functions of the step; the data set of one stage at a time is kept open.

    Args:
        cache: of what the teacher says, if any: of it every micro-batch brings what is known of its sequences.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        vocab_size: int,
        device: torch.device,
        cache: TeacherCache | None = None,
    ) -> None:
        self.curriculum, self.recipe, self.cache = curriculum, curriculum.recipe, cache
        self.vocab_size, self.device = vocab_size, device
        self.datasets: dict[int, Any] = {}

    def of_step(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches, cut for context parallelism; each once for every budget that it trains.

        Raises ``UserError`` where a token has no embedding.
        """
        place, groups = self.curriculum.place(step), runtime.groups()
        stage, rank, ranks = place.stage, groups.dp.rank(), groups.dp.size()
        samples, out = self._dataset(place.stage_index), []
        for m in range(stage.global_batch_size // (stage.micro_batch_size * ranks)):
            batch = blend.batch(
                samples, place.samples, micro_batch_size=stage.micro_batch_size, dp_rank=rank, dp_size=ranks,
                microbatch=m,
            )  # fmt: skip
            check_tokens(batch["tokens"], self.vocab_size)
            first = (m * ranks + rank) * stage.micro_batch_size
            lesson = self.cache.lesson(batch["tokens"]) if self.cache is not None else None
            found = micro_batches(batch, self.device, self.curriculum, place, first)
            out += [replace(micro_batch, lesson=lesson) for micro_batch in found]
        return out

    def check_known(self, first: int, last: int) -> None:
        """Raise ``UserError`` on all ranks where the cache lacks a sequence of steps ``first`` to ``last - 1``.

        Ranks share the sequences. Nothing is looked at where there is a teacher that could be asked.
        """
        if self.cache is None or not self.cache.only:
            return
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        counts = torch.zeros(2, dtype=torch.int64)
        for step in range(first, last):
            place = self.curriculum.place(step)
            samples, end = self._dataset(place.stage_index), place.samples + place.stage.global_batch_size
            for row in range(place.samples + rank, end, ranks):
                counts += torch.tensor([1, not self.cache.lists(samples[row]["tokens"])])
        counts = counts.to(self.device)
        torch.distributed.all_reduce(counts)
        if int(counts[1]):
            raise UserError(self.cache.lacks(f"{int(counts[1])} of the {int(counts[0])} sequences ahead"))

    def budgets(self, place: Place) -> str | dict[str, int]:
        """The budgets of a step's micro-batches on all ranks: a name, or how many each had."""
        stage = place.stage
        samples = range(0, stage.global_batch_size, stage.micro_batch_size)
        drawn = Counter(
            budget
            for s in samples
            for budget, _ in self.curriculum.draw_budgets(place, self.curriculum.unit(place, s))
        )
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


def micro_batches(
    batch: Mapping[str, Tensor],
    device: torch.device,
    curriculum: Curriculum,
    place: Place | None,
    sample: int,
) -> list[MicroBatch]:
    """This rank's part of a batch of whole sequences, with its draws: one for every budget.

    Args:
        place: of the step; ``None`` outside of training, where nothing is drawn.
        sample: the batch's first, counted within the step.
    """
    context, recipe = runtime.groups().cp, curriculum.recipe
    own = {k: zigzag(batch[k], 1, context.rank(), context.size()) for k in blend.BATCH_KEYS}
    local = runtime.sent(own, device)
    if place is None:
        return [MicroBatch(**local, step=0, budget=None, key=())]
    unit = curriculum.unit(place, sample)
    plain = MicroBatch(**local, step=place.step, budget=None, key=(recipe.seed, "gumbel", place.step, unit))
    if not recipe.budgets:
        return [plain]
    sliced = place.stage.execution != "masked"
    return [
        replace(plain, budget=budget, weight=weight, again=index > 0, sliced=sliced)
        for index, (budget, weight) in enumerate(curriculum.draw_budgets(place, unit))
    ]


def eval_windows(recipe: Recipe) -> list[Tensor]:
    """The first ``eval_tokens`` tokens of ``data.valid`` in windows of the first stage's length, or calibration's."""
    if not recipe.data.valid:
        return []
    length = _first_pass(recipe).seq_length
    count = max(1, recipe.log.eval_tokens // length)
    valid = dataset(recipe, recipe.data.valid, seq_length=length, num_samples=count)
    return [torch.as_tensor(valid[i]["tokens"]) for i in range(min(count, len(valid)))]


def eval_batch_size(recipe: Recipe) -> int:
    """Windows of one forward pass: as many as a micro-batch of that pass has, which is known to fit."""
    return _first_pass(recipe).micro_batch_size


def _first_pass(recipe: Recipe) -> Stage | Quantize:
    found = recipe.stages[0] if recipe.stages else recipe.quantize
    assert found is not None
    return found
