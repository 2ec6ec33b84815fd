"""Jobs that share a run folder: one after the other, and of one curriculum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..cost.remedy import said, written
from ..recipe import JobChain, PlannedJob, Recipe
from .family import Found, ancestors

# what a job that trains on a quantised model needs to have in common with one that quantised it before
_QUANTISES = ("model", "quantize")
# sections that decide what training computes; how it is laid out, logged and saved may change on the way
_DECIDES = ("seed", "model", "space", "budgets", "router", "optimizer", "teacher", "loss", "quantize")
# and keys of them that do not
_HOW = {
    "teacher": {"cache_only"},
    "loss": {"chunk", "recompute"},
    "stages": {"micro_batch_size", "execution"},
}


def shared_runs(chain: JobChain, job: PlannedJob) -> Iterator[Found]:
    """What is wrong between a job and the jobs above it that write to the same run folder."""
    if job.recipe.job == "export":
        return
    before, names = ancestors(chain, job), [each.name for each in chain.jobs]
    for other in chain.jobs[: names.index(job.name)]:
        if other.recipe.job == "export" or other.recipe.run_dir != job.recipe.run_dir:
            continue
        if other.name not in before:
            text = f"run_dir: {job.recipe.run_dir} is that of job {other.name} too"
            yield "error", f"{text}; add {other.name} to jobs.{job.name}.after, or choose another run_dir"
        elif other.recipe.job == "quantize" and job.recipe.job == "train" and job.recipe.quantize is not None:
            if text := _unlike(other, _dumped(job.recipe, _QUANTISES), _dumped(other.recipe, _QUANTISES)):
                yield "error", text
        elif other.recipe.job != "train" or job.recipe.job != "train":
            text = f"run_dir: {job.recipe.run_dir} holds the checkpoints of job {other.name}"
            yield "error", f"{text}, which {job.recipe.job} would take for its own; choose another run_dir"
        else:
            for text in _continued(other, job):
                yield "error", text


def _continued(first: PlannedJob, then: PlannedJob) -> Iterator[str]:
    """Two jobs of one run: the same training, and the second goes further than the first."""
    if text := _unlike(first, _deciding(then.recipe), _deciding(first.recipe)):
        yield text
    elif then.recipe.last_step <= first.recipe.last_step:
        text = f"training ends at step {then.recipe.last_step}, to which {first.name} has come already"
        ends = [stage.name for stage in first.recipe.stages]
        stop = first.recipe.stop_after
        if stop is None or stop == ends[-1]:
            yield f"{text}; take this job out, or set {first.name}.stop_after to an earlier stage"
        else:
            yield f"{text}; set stop_after=null"


def _unlike(first: PlannedJob, mine: dict[str, Any], other: dict[str, Any]) -> str | None:
    """What a job has otherwise than one before it in the same run folder."""
    found = _difference(mine, other, "")
    if found is None:
        return None
    key, own, theirs = found
    verb = "trains" if first.recipe.job == "train" else "quantises"
    return (
        f"{key}={written(own)} is {written(theirs)} in {first.name}, which {verb} in the same run_dir; "
        f"{said({key: theirs})}"
    )


def _dumped(recipe: Recipe, sections: tuple[str, ...]) -> dict[str, Any]:
    return recipe.model_dump(mode="json", include=set(sections))


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """What decides training, as plain values by their keys; a stage's draw is as large as it comes out."""
    whole = recipe.model_dump(
        mode="json", include=set(_DECIDES), exclude={name: _HOW[name] for name in ("teacher", "loss")}
    )
    whole["data"] = {"train": recipe.model_dump(mode="json", include={"data"})["data"]["train"]}
    whole["stages"] = [
        stage.model_dump(mode="json", exclude=_HOW["stages"])
        | {"samples_per_draw": stage.draw_size, "budget_probs": recipe.budget_probabilities(stage)}
        for stage in recipe.stages
    ]
    return whole


def _difference(mine: Any, other: Any, key: str) -> tuple[str, Any, Any] | None:
    """The first key whose values differ, and both values."""
    if mine == other:
        return None
    pairs: list[tuple[object, Any, Any]] = []
    if isinstance(mine, dict) and isinstance(other, dict) and not key.endswith("budget_probs"):
        pairs = [(name, mine.get(name), other.get(name)) for name in dict.fromkeys([*mine, *other])]
    elif isinstance(mine, list) and isinstance(other, list) and len(mine) == len(other) and key == "stages":
        pairs = [(index, *pair) for index, pair in enumerate(zip(mine, other, strict=True))]
    inner = (_difference(left, right, f"{key}.{name}".strip(".")) for name, left, right in pairs)
    return next((found for found in inner if found is not None), (key, mine, other))
