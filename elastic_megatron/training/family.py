"""From a recipe to the parent it names, wherever that lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.manifest import Manifest
from ..checkpoint.source import Source, open_source
from ..errors import UserError
from ..recipe import Recipe
from ..space import ParentShape, SubmodelSpec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parent_source(recipe: Recipe) -> Source:
    """Where the parent comes from: ``model.hf``, ``model.checkpoint`` or fresh weights of ``model.sizes``."""
    model = recipe.model
    if model.sizes is not None:
        shape = ParentShape.from_dict(model.sizes.model_dump())

        def keep(_: Sequence[nn.Module]) -> None:
            """The weights that the seed gave."""

        return Source(Path(), Manifest(shape=shape), keep, model.tokenizer)
    path = model.hf or model.checkpoint
    assert path is not None, "the recipe checks that one of hf, checkpoint and sizes is there"
    source = open_source(path)
    return source if model.tokenizer is None else replace(source, hf_files=model.tokenizer)


def family_of(recipe: Recipe, manifest: Manifest) -> dict[str, SubmodelSpec]:
    """The submodels of a checkpoint that the recipe's budgets name; all of them where it names none.

    Raises ``UserError`` where one is missing.
    """
    if missing := [name for name in recipe.budgets if name not in manifest.submodels]:
        known = ", ".join(manifest.submodels) or "none"
        raise UserError(
            f"budgets.{missing[0]}: model.checkpoint has no submodel of this name; it has {known}: rename or "
            "remove the budget, or name the checkpoint of a trained family"
        )
    return {n: s for n, s in manifest.submodels.items() if not recipe.budgets or n in recipe.budgets}
