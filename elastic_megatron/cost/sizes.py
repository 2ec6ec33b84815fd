"""The sizes of a model as cost formulas read them: groups of like layers, and the hidden width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..space import ElasticSpace, ParentShape, SubmodelSpec
from ..space.layouts import Number


@dataclass(frozen=True)
class LayerGroup:
    """Layers of one type that share a set of sizes.

    ``sizes`` holds every ``ParentShape`` field; a value is a number, or a vector with one entry per layer of
    the group. ``weight`` is how many such layers there are, or a vector of the probabilities that each is
    kept. ``feeds_attention`` marks Mamba layers in front of an attention layer, which official low-precision
    checkpoints keep in BF16 (Nemotron 3 Nano report, arXiv 2512.20848).
    """

    symbol: str
    sizes: Mapping[str, Number]
    weight: Number
    feeds_attention: bool = False

    def total(self, per_layer: Number) -> Number:
        """Sum a per-layer quantity over the group."""
        value = self.weight * per_layer
        return value.sum() if hasattr(value, "sum") else value


@dataclass(frozen=True)
class ModelSizes:
    """A whole model: its layer groups and the sizes of its ends."""

    parent: ParentShape
    groups: tuple[LayerGroup, ...]
    hidden_size: Number

    def ends(self) -> dict[str, Number]:
        return {"vocab_size": self.parent.vocab_size, "hidden_size": self.hidden_size}


def parent_fields(parent: ParentShape) -> dict[str, Number]:
    """The integer fields of a shape, as the mapping that layouts read."""
    return {k: v for k, v in parent.to_dict().items() if isinstance(v, int) and not isinstance(v, bool)}


def feeds_attention(parent: ParentShape, layer: int) -> bool:
    """Is it a Mamba layer that an attention layer follows?"""
    pattern = parent.hybrid_layer_pattern
    return pattern[layer] == "M" and pattern[layer + 1 : layer + 2] == "*"


def sizes_of_spec(space: ElasticSpace, spec: SubmodelSpec) -> ModelSizes:
    """Exact integer sizes of a submodel, heterogeneous or not."""
    parent, counted = space.parent, {}
    for layer in space.kept_layers(spec):
        widths = tuple(sorted(space.layer_sizes(spec, layer).items()))
        key = (parent.hybrid_layer_pattern[layer], widths, feeds_attention(parent, layer))
        counted[key] = counted.get(key, 0) + 1
    fields = parent_fields(parent)
    groups = tuple(
        LayerGroup(symbol, {**fields, **dict(widths)}, n, feeds)
        for (symbol, widths, feeds), n in counted.items()
    )
    return ModelSizes(parent, groups, spec.get("hidden_size", parent.hidden_size))


def sizes_of_parent(parent: ParentShape) -> ModelSizes:
    """Sizes of a model as it stands."""
    return sizes_of_spec(ElasticSpace(parent, ()), SubmodelSpec())
