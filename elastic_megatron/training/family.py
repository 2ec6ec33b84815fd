"""From a recipe to the values that the floors below take: the parent's source, the space, the budgets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.manifest import Manifest
from ..checkpoint.source import Source, open_source
from ..recipe import Recipe
from ..space import Budget, ElasticSpace, ParentShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parent_source(recipe: Recipe) -> Source:
    """Where the parent comes from: ``model.hf``, ``model.checkpoint`` or fresh weights of ``model.sizes``."""
    model = recipe.model
    if model.sizes is not None:
        shape = ParentShape.from_dict(model.sizes.model_dump())

        def keep(_: nn.Module) -> None:
            """The weights that the seed gave."""

        return Source(Path(), Manifest(shape=shape), keep, model.tokenizer)
    path = model.hf or model.checkpoint
    assert path is not None, "the recipe checks that one of hf, checkpoint and sizes is there"
    source = open_source(path)
    return source if model.tokenizer is None else replace(source, hf_files=model.tokenizer)


def elastic_space(recipe: Recipe, manifest: Manifest) -> ElasticSpace | None:
    """The space of the recipe over the manifest's model, in its stored order; ``None`` without choices.

    A sorted checkpoint fixes lanes and the layer order, because its weights lie in them; the recipe may
    still choose other widths. Raises ``UserError`` where the recipe's widths do not fit the model.
    """
    if not recipe.space.choices:
        return manifest.space
    lanes, order = dict(recipe.space.lanes), ()
    if manifest.space is not None:
        lanes |= {a: n for a, n in manifest.space.lanes if a in recipe.space.choices}
        order = manifest.space.layer_order
    return ElasticSpace.build(
        manifest.shape,
        recipe.space.choices,
        lanes,
        recipe.space.granule,
        recipe.space.per_layer,
        order,
    )


def budgets(recipe: Recipe) -> tuple[Budget, ...]:
    """The recipe's budgets, in its order."""
    out = []
    for name, budget in recipe.budgets.items():
        fields = budget.model_dump()
        if fields.get("table") is not None:
            fields["table"] = str(fields["table"])
        out.append(Budget(name=name, **fields))
    return tuple(out)
