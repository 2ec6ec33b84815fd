"""What stays elastic in a submodel: the smaller submodels that are nested in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..space import ElasticSpace, ParentShape, SubmodelSpec, axis, not_part
from .manifest import Manifest


def nested_manifest(manifest: Manifest, submodel: str) -> Manifest:
    """Description of a cut-out submodel as an elastic parent of its own.

    Its weights are those of ``slice_state``: slicing them again with this manifest gives what slicing the
    original would. Its ``hf_config`` is still the parent's. Raises ``UserError`` for an unknown or heterogeneous one.
    """
    space, spec = manifest.space, manifest.submodel(submodel)
    assert space is not None
    shape = space.shape_of(spec)
    axes = [a for a in space.axes if shape.size(a)]
    layers = {old: new for new, old in enumerate(space.kept_layers(spec))}
    inner = ElasticSpace.build(
        shape,
        {a: [w for w in space.choices_of(a) if w <= shape.size(a)] for a in axes},
        {a: space.lanes_of(a) for a in axes},
        per_layer=[a for a in axes if a in space.per_layer],
        layer_order=[layers[i] for i in space.layer_order if i in layers],
    )
    family = {
        name: _narrow(other, space.parent, layers, axes)
        for name, other in manifest.submodels.items()
        if other <= spec
    }
    return replace(
        manifest,
        shape=shape,
        space=inner,
        submodels=family,
        budgets=tuple(b for b in manifest.budgets if b.name in family),
    )


def left_out(manifest: Manifest, submodel: str) -> list[str]:
    """A line for each size that is neither part of this one nor contains it, and stays behind when it is cut out."""
    spec = manifest.submodel(submodel)
    return [
        f"{not_part(name, other, submodel, spec)}; it is not in what was cut out"
        for name, other in manifest.submodels.items()
        if not (other <= spec or spec <= other)
    ]


def _narrow(
    spec: SubmodelSpec, parent: ParentShape, layers: Mapping[int, int], axes: list[str]
) -> SubmodelSpec:
    """The same submodel, its per-layer widths listed for the remaining layers."""
    widths: dict[str, Any] = {}
    for a in axes:
        width = spec[a]
        if isinstance(width, tuple):
            owners = parent.layers_of(axis(a).symbol)
            width = tuple(w for w, layer in zip(width, owners, strict=True) if layer in layers)
        widths[a] = width
    return SubmodelSpec.of(widths)
