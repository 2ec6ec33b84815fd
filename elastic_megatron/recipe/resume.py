"""Which keys of a recipe may change from one start of a run to the next, and what a change does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from elastic_megatron.recipe.schema import Recipe

MAY_CHANGE: Mapping[str, str] = {
    "name": "logs and reports get another title",
    "job": "nothing: the command that is called decides",
    "run_dir": "the folder has been moved, with all that is in it",
    "model.tokenizer": "later checkpoints and exports carry another tokenizer; token ids stay what they were",
    "data.valid": "evaluations from now on are of other text",
    "data.cache": "indices are looked for, and built, in another folder",
    "rank": "nothing in training: the parent is sorted already",
    "stages[].micro_batch_size": "another cut of the same batches; with samples_per_draw given, or without budgets",
    "stages[].execution": "the same numbers in another time",
    "stop_after": "this job ends after another stage; the schedules stay",
    "router.accept_missed_budgets": "how the run ends where a size costs more or less than its budget",
    "teacher.cache_only": "the teacher is held in memory, or not",
    "loss.chunk": "the same loss in another memory",
    "loss.recompute": "the same loss in another memory",
    "loss.divergence_patience": "how many steps that are not finite end or rewind the run",
    "loss.on_divergence": "what such steps lead to",
    "loss.max_rewinds": "how often; rewinds of earlier starts count",
    "loss.spike_window": "which steps are marked from now on",
    "loss.spike_threshold": "which steps are marked from now on",
    "parallel": "another layout of the same training: it loads what any other saved",
    "checkpoint": "when checkpoints are written and how many are kept from now on",
    "log": "when lines and evaluations come, and how long those are",
    "export": "what is exported later",
    "slurm": "what later jobs ask for",
}
"""Key, or what begins it, and what a change does."""

DECIDES: Mapping[str, str] = {
    "seed": "order of the data, draws, noise",
    "model": "the weights that training began with",
    "data.train": "the text",
    "space": "the widths that there are",
    "budgets": "the sizes that are trained",
    "router": "how sizes choose their widths",
    "optimizer": "every update",
    "stages": "order of the data, learning rates, odds; new stages may be added at the end",
    "teacher": "what is distilled",
    "loss": "what is minimised",
    "quantize": "how weights are rounded",
    "parallel.distributed_optimizer": "how the state of the optimizer is stored",
}
"""Key, or what begins it, and what of the training it decides; the longer of two that fit counts."""

FIXED_BY_RANKING = ("seed", "model", "data.train", "space", "rank")
"""What a sorted checkpoint depends on."""

FIXED_BY_QUANTIZING = ("model", "quantize")
"""What a quantised checkpoint that nobody trained yet has in common with the training that goes on from it."""


@dataclass(frozen=True)
class Changed:
    """A key as an override names it, with the value of each recipe."""

    key: str
    before: Any
    after: Any


def may_change(key: str) -> bool:
    """May training go on with another value of a key, as `stages[].lr` or `stages.0.lr`?"""
    found = [
        (len(prefix), table is MAY_CHANGE)
        for table in (MAY_CHANGE, DECIDES)
        for prefix in table
        if _begins(key, prefix)
    ]
    return max(found, default=(0, False))[1]


def forbidden(before: Recipe, after: Recipe) -> Iterator[Changed]:
    """What training cannot go on with: keys that differ and decide it."""
    for changed in _changes(_plain(before), _plain(after), ""):
        if not may_change(changed.key):
            yield changed


def fixed(before: Recipe, after: Recipe, sections: tuple[str, ...]) -> Iterator[Changed]:
    """What differs between two recipes in some sections; where pieces of the model are cut does not count."""
    for changed in _changes(_plain(before), _plain(after), ""):
        within = any(_begins(changed.key, section) for section in sections)
        if within and not changed.key.endswith("micro_batch_size") and changed.key != "model.tokenizer":
            yield changed


def tables() -> str:
    """Both tables in Markdown, for the documentation."""
    parts = []
    for title, table in (
        ("may change | what it does", MAY_CHANGE),
        ("may not change | what it decides", DECIDES),
    ):
        rows = "".join(f"| `{key}` | {words} |\n" for key, words in table.items())
        parts.append(f"| {title} |\n|---|---|\n{rows}")
    return "\n".join(parts)


def _begins(key: str, prefix: str) -> bool:
    pattern = re.sub(r"\.\d+(?=\.|$)", "[]", key)
    return re.match(rf"{re.escape(prefix)}(?![A-Za-z0-9_])", pattern) is not None


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Plain values by their keys; draws and odds of a stage as large as they come out."""
    whole = recipe.model_dump(mode="json")
    for dumped, stage in zip(whole["stages"], recipe.stages, strict=True):
        dumped["samples_per_draw"] = stage.draw_size if recipe.budgets else None
        dumped["budget_probs"] = recipe.budget_probabilities(stage)
    return whole


def _changes(before: Any, after: Any, key: str) -> Iterator[Changed]:
    """The innermost keys that differ; stages that were added at the end are none."""
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict) and not key.endswith("budget_probs"):
        for name in dict.fromkeys([*before, *after]):
            yield from _changes(before.get(name), after.get(name), f"{key}.{name}".strip("."))
    elif key == "stages" and len(before) <= len(after):
        for index, (old, new) in enumerate(zip(before, after, strict=False)):
            yield from _changes(old, new, f"{key}.{index}")
    else:
        yield Changed(key, before, after)
