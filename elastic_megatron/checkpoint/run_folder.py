"""Does a run folder hold the run that a recipe describes? No torch: a login node may ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from ..cost.remedy import said, written
from ..errors import UserError
from ..recipe import Recipe, dump, load
from ..recipe.resume import FIXED_BY_QUANTIZING, FIXED_BY_RANKING, Changed, fixed, forbidden
from . import tracker

RECIPE = "recipe.yaml"


def check_resumed(recipe: Recipe, command: Literal["rank", "quantize", "train"]) -> None:
    """Raise ``UserError`` where the run folder holds checkpoints that a command with this recipe cannot go on from.

    They are of another command, or of a recipe that differs in a key that may not change (``recipe.resume``).
    """
    folder = recipe.run_dir
    saved = tracker.newest(folder / "checkpoints")
    if saved is None:
        return
    step = tracker.iteration(saved)
    if command == "rank" and step:
        text = f"{folder} holds a run that was trained to step {step}, which rank would set back to step 0"
        raise UserError(f"{text}; choose another run_dir")
    if command == "train" and not step and recipe.quantize is None:
        text = f"{folder} holds a checkpoint of step 0, which rank wrote and train cannot go on from"
        raise UserError(f"{text}; choose another run_dir, with model.checkpoint={folder}")
    before = _recipe_of(folder)
    if before is None or dump(before) == dump(recipe):
        return
    if found := list(_changed(before, recipe, command, step)):
        first, more = found[0], f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(
            f"{first.key}={written(first.after)} is {written(first.before)} in {folder / RECIPE}{more}, and the run "
            f"cannot go on with another one; {said({first.key: first.before})}, or choose another run_dir"
        )


def _changed(before: Recipe, recipe: Recipe, command: str, step: int) -> Iterator[Changed]:
    if command == "rank":
        return fixed(before, recipe, FIXED_BY_RANKING)
    if command == "quantize" or not step:
        return fixed(before, recipe, FIXED_BY_QUANTIZING)
    return forbidden(before, recipe)


def _recipe_of(folder: Path) -> Recipe | None:
    """The resolved recipe of the last start; ``None`` where somebody removed it."""
    file = folder / RECIPE
    if not file.exists():
        return None
    try:
        return load(file)
    except UserError as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"{file}, which says what the run was started with, cannot be read ({reason}); restore it, or remove it "
            "if you know that the recipe has not changed"
        ) from None
