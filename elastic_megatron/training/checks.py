"""What ``rank``, ``train`` and ``quantize`` refuse of a recipe before anything is built. No torch."""

from __future__ import annotations

from ..checkpoint.named import described
from ..checkpoint.run_folder import check_resumed
from ..cost.layout import check_sequence
from ..data.token_files import check_prefix
from ..errors import UserError
from ..files.targets import check_writable
from ..recipe import Recipe

_ADD_DATA = "add prefixes written by prepare-data"


def check_rank(recipe: Recipe) -> None:
    """Raise ``UserError`` for a recipe that cannot be ranked."""
    if recipe.quantize is not None:
        raise UserError("the recipe has a section quantize; sort first and quantise then: set quantize=null")
    if not recipe.space.choices:
        raise UserError("the recipe has no space.choices, so there is nothing to rank; name the elastic axes")
    if "num_layers" in recipe.space.choices and not recipe.rank.depth:
        raise UserError("num_layers is elastic but rank.depth is false; set rank.depth: true")
    if not recipe.data.train:
        raise UserError(f"the recipe has no data.train to calibrate on; {_ADD_DATA}")
    for problem in check_sequence(recipe.parallel, "rank", recipe.rank.seq_length):
        raise UserError(problem)
    _check_files(recipe)
    check_resumed(recipe, "rank")


def check_train(recipe: Recipe) -> None:
    """Raise ``UserError`` for a recipe that cannot be trained."""
    if not recipe.stages:
        raise UserError("the recipe has no stages, so there is nothing to train; add stages:")
    if not recipe.data.train:
        raise UserError(f"the recipe has no data.train; {_ADD_DATA}")
    _check_files(recipe)
    check_resumed(recipe, "train")


def check_quantize(recipe: Recipe) -> None:
    """Raise ``UserError`` for a recipe that cannot be quantised."""
    if recipe.quantize is None:
        raise UserError(
            "the recipe has no section quantize, so there is nothing to do; add it, with a format"
        )
    if not recipe.data.train:
        raise UserError(f"the recipe has no data.train to calibrate on; {_ADD_DATA}")
    _check_files(recipe)
    check_resumed(recipe, "quantize")


def _check_files(recipe: Recipe) -> None:
    """Data sets, the parent's description, and the run folder."""
    for source in (*recipe.data.train, *recipe.data.valid):
        check_prefix(str(source.path))
    if (parent := recipe.model.hf or recipe.model.checkpoint) is not None:
        described(parent)
    check_writable(recipe.run_dir)
