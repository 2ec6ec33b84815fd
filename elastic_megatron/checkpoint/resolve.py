"""From a recipe or a model directory to shapes, spaces and budgets, without torch: sizes need no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.json_files import read_object
from ..files.reading import inside
from ..recipe import Recipe
from ..space import Budget, ElasticSpace, ParentShape
from .hf_quantised import unquantised
from .manifest import FILE, Manifest
from .tracker import resolve

CONFIG = "config.json"
ELASTIC_CONFIG = "elastic_config.json"


def parent_manifest(recipe: Recipe) -> Manifest:
    """What is known of the recipe's parent: from ``model.sizes``, ``model.hf`` or ``model.checkpoint``.

    Raises ``UserError`` where the directory or its description is missing or damaged.
    """
    model = recipe.model
    if model.sizes is not None:
        return Manifest(shape=ParentShape.from_dict(model.sizes.model_dump()))
    if model.hf is not None:
        return hf_manifest(model.hf)
    assert model.checkpoint is not None, "the recipe checks that one of hf, checkpoint and sizes is there"
    return Manifest.read(resolve(model.checkpoint) / FILE)


def hf_manifest(path: Path) -> Manifest:
    """Description of a Hugging Face directory (or its ``config.json``), with submodels if it is elastic."""
    config = path if path.name == CONFIG else path / CONFIG
    elastic = config.with_name(ELASTIC_CONFIG)
    if elastic.exists():
        manifest = Manifest.read(elastic)
        return replace(manifest, hf_config=unquantised(manifest.hf_config))
    data = read_object(inside(config.parent, CONFIG, config.parent), "give a Hugging Face model directory")
    return Manifest(shape=hf_shape(data, config), hf_config=unquantised(data))


def hf_shape(config: Mapping[str, Any], file: Path) -> ParentShape:
    """The shape that a ``config.json`` states. Raises ``UserError`` that names ``file``, as ``ParentShape.from_hf``."""
    try:
        return ParentShape.from_hf(config)
    except UserError as e:
        raise UserError(f"{file}: {e}") from None


def elastic_space(recipe: Recipe, manifest: Manifest) -> ElasticSpace | None:
    """The space of the recipe over the manifest's model, in its stored order; ``None`` without choices.

    A sorted checkpoint fixes lanes and the layer order, because its weights lie in them; the recipe may
    still choose other widths. Raises ``UserError`` where the recipe's widths do not fit the model.
    """
    chosen = recipe.space
    if not chosen.choices:
        return manifest.space
    lanes, order = dict(chosen.lanes), ()
    if manifest.space is not None:
        lanes |= {a: n for a, n in manifest.space.lanes if a in chosen.choices}
        order = manifest.space.layer_order
    return ElasticSpace.build(manifest.shape, chosen.choices, lanes, chosen.granule, chosen.per_layer, order)


def budgets(recipe: Recipe) -> tuple[Budget, ...]:
    """The recipe's budgets, in its order."""
    out = []
    for name, budget in recipe.budgets.items():
        fields: dict[str, Any] = budget.model_dump()
        if fields.get("table") is not None:
            fields["table"] = str(fields["table"])
        out.append(Budget(name=name, **fields))
    return tuple(out)
