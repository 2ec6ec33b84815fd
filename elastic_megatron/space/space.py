"""An elastic space: which widths each axis may take, and in which stored order its components lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

from ..errors import UserError
from .axes import AXIS_NAMES, axis
from .parent import ParentShape
from .stated import MOST_LAYERS, listed, section, shown, whole_number, whole_numbers
from .submodel import SubmodelSpec

GLOBAL_AXES = ("hidden_size", "num_layers")


def stored_order(ranked: Sequence[int], lanes: int, groups: int = 1) -> list[int]:
    """Deal a ranking into lanes: ``stored[j]`` is the component that goes to position j.

    ``ranked`` lists components by decreasing importance, group after group where there are structural
    groups. Inside a group the components are dealt round-robin to ``lanes / groups`` equal blocks, so the
    first k of every lane are exactly the best ``k * lanes`` of the ranking.
    """
    size = len(ranked) // groups
    per_group = lanes // groups
    return [
        ranked[g * size + i]
        for g in range(groups)
        for lane in range(per_group)
        for i in range(lane, size, per_group)
    ]


def undeal(size: int, lanes: int, groups: int = 1) -> list[int]:
    """Positions that read a stored order back as the plain ranking: the inverse of ``stored_order``."""
    dealt = stored_order(range(size), lanes, groups)
    plain = [0] * size
    for position, rank in enumerate(dealt):
        plain[rank] = position
    return plain


@dataclass(frozen=True)
class ElasticSpace:
    """The family a run trains: ``choices`` per axis (descending, the parent's size first).

    Args:
        parent: the full model.
        choices: legal widths of each elastic axis.
        lanes: lanes of each elastic axis' stored order (see ``stored_order``).
        per_layer: axes whose width may differ between layers.
        layer_order: layer indices by decreasing importance; depth k keeps the first k of them.
    """

    parent: ParentShape
    choices: tuple[tuple[str, tuple[int, ...]], ...]
    lanes: tuple[tuple[str, int], ...] = ()
    per_layer: frozenset[str] = frozenset()
    layer_order: tuple[int, ...] = ()
    _choices: dict[str, tuple[int, ...]] = field(init=False, repr=False, compare=False, hash=False)
    _lanes: dict[str, int] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_choices", dict(self.choices))
        object.__setattr__(self, "_lanes", dict(self.lanes))
        order = self.layer_order or tuple(range(self.parent.num_layers))
        object.__setattr__(self, "layer_order", order)
        assert sorted(order) == list(range(self.parent.num_layers))

    @classmethod
    def build(
        cls,
        parent: ParentShape,
        choices: Mapping[str, Sequence[int]],
        lanes: Mapping[str, int] | None = None,
        granule: Mapping[str, int] | None = None,
        per_layer: Sequence[str] = (),
        layer_order: Sequence[int] = (),
    ) -> ElasticSpace:
        """Validate and build. Raises ``UserError`` naming the axis, the width and the nearest legal ones."""
        lanes, granule = dict(lanes or {}), dict(granule or {})
        for name in (*choices, *lanes, *granule, *per_layer):
            _check_axis(name, parent)
        if bad := [a for a in per_layer if a in GLOBAL_AXES]:
            raise UserError(f"space.per_layer: {bad[0]} is one choice for the whole model; remove it there")
        if missing := [a for a in (*lanes, *granule, *per_layer) if a not in choices]:
            raise UserError(f"space: {missing[0]} has lanes, granule or per_layer but no space.choices")
        if layer_order and sorted(layer_order) != list(range(parent.num_layers)):
            raise UserError(
                f"space.layer_order {shown(list(layer_order))} is no order of the {parent.num_layers} layers"
            )
        full_lanes = {}
        for name, widths in choices.items():
            full_lanes[name] = _lanes(name, parent, lanes.get(name))
            _check_widths(name, widths, parent, lcm(full_lanes[name], granule.get(name, 1)))
        table = {a: tuple(sorted({parent.size(a), *w}, reverse=True)) for a, w in choices.items()}
        order = [a for a in AXIS_NAMES if a in table]
        return cls(
            parent=parent,
            choices=tuple((a, table[a]) for a in order),
            lanes=tuple((a, full_lanes[a]) for a in order),
            per_layer=frozenset(per_layer),
            layer_order=tuple(layer_order),
        )

    @property
    def axes(self) -> tuple[str, ...]:
        """Elastic axes, in the fixed order of ``AXIS_NAMES``."""
        return tuple(self._choices)

    def choices_of(self, axis_name: str) -> tuple[int, ...]:
        return self._choices[axis_name]

    def lanes_of(self, axis_name: str) -> int:
        """Lanes of an axis; axes that are not elastic have their structural ones."""
        return self._lanes.get(axis_name) or _lanes(axis_name, self.parent, None)

    def layers(self, axis_name: str) -> tuple[int, ...]:
        """Model layers that own the axis; empty for the two global axes."""
        symbol = axis(axis_name).symbol
        return self.parent.layers_of(symbol) if symbol else ()

    def full(self) -> SubmodelSpec:
        return SubmodelSpec.of({a: self.parent.size(a) for a in self.axes})

    def smallest(self) -> SubmodelSpec:
        return SubmodelSpec.of({a: self._choices[a][-1] for a in self.axes})

    def check(self, spec: SubmodelSpec, name: str = "submodel") -> None:
        """Raise ``UserError`` unless every width of ``spec`` is one of the choices."""
        if set(spec) != set(self.axes):
            raise UserError(f"{name} names axes {sorted(spec)}, this checkpoint has {sorted(self.axes)}")
        for a in self.axes:
            width = spec[a]
            if isinstance(width, tuple) and (a in GLOBAL_AXES or len(width) != len(self.layers(a))):
                raise UserError(f"{name}: {a} needs {len(self.layers(a)) or 1} widths, got {len(width)}")
            for w in width if isinstance(width, tuple) else (width,):
                if w not in self._choices[a]:
                    raise UserError(f"{name}: {a}={w} is no choice; choose from {list(self._choices[a])}")

    def kept(self, axis_name: str, width: int, parts: int = 1) -> list[int]:
        """Stored positions of a submodel's components: the first ``width / lanes`` of every lane.

        With ``parts``, on one of so many ranks that share the lanes: positions within its part, alike on all.
        """
        size, lanes = self.parent.size(axis_name), self.lanes_of(axis_name)
        assert lanes % parts == 0, f"{lanes} lanes of {axis_name} for {parts} ranks"
        block, share = size // lanes, width // lanes
        lanes //= parts
        return [lane * block + i for lane in range(lanes) for i in range(share)]

    def kept_layers(self, spec: SubmodelSpec) -> tuple[int, ...]:
        """Indices of the parent's layers that the submodel keeps, in model order."""
        depth = spec.get("num_layers", self.parent.num_layers)
        assert isinstance(depth, int)
        return tuple(sorted(self.layer_order[:depth]))

    def layer_sizes(self, spec: SubmodelSpec, layer: int | None) -> dict[str, int]:
        """Widths of every elastic axis that touches one layer, or what lies outside of the layers (``None``)."""
        if layer is None:
            return {a: spec.at(a, 0) for a in spec if a == "hidden_size"}
        symbol = self.parent.hybrid_layer_pattern[layer]
        position = self.parent.layers_of(symbol).index(layer)
        return {a: spec.at(a, position) for a in spec if a == "hidden_size" or axis(a).symbol == symbol}

    def differing(self, spec: SubmodelSpec) -> tuple[str, ...]:
        """Axes whose width differs between layers that the submodel keeps."""
        layers = self.kept_layers(spec)
        widths: dict[str, set[int]] = {}
        for layer in layers:
            for a, width in self.layer_sizes(spec, layer).items():
                widths.setdefault(a, set()).add(width)
        return tuple(a for a in self.axes if len(widths.get(a, ())) > 1)

    def shape_of(self, spec: SubmodelSpec) -> ParentShape:
        """The submodel as a model of its own. Raises ``UserError`` where its layers differ in width."""
        if differing := self.differing(spec):
            raise UserError(
                f"{', '.join(differing)} differs between layers, but a nemotron_h model has one width "
                "for all; choose a submodel with equal widths (train without space.per_layer)"
            )
        return self.widest_shape(spec)

    def widest_shape(self, spec: SubmodelSpec) -> ParentShape:
        """The submodel's layers, every axis at its largest width among them."""
        layers = self.kept_layers(spec)
        sizes: dict[str, int] = {}
        for layer in layers:
            for a, width in self.layer_sizes(spec, layer).items():
                sizes[a] = max(width, sizes.get(a, 0))
        pattern = "".join(self.parent.hybrid_layer_pattern[i] for i in layers)
        return self.parent.override(hybrid_layer_pattern=pattern, **sizes)

    def with_layer_order(self, order: Sequence[int]) -> ElasticSpace:
        return replace(self, layer_order=tuple(order))

    def to_dict(self) -> dict[str, Any]:
        return {
            "parent": self.parent.to_dict(),
            "choices": {a: list(w) for a, w in self.choices},
            "lanes": dict(self.lanes),
            "per_layer": sorted(self.per_layer),
            "layer_order": list(self.layer_order),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ElasticSpace:
        """Inverse of ``to_dict``. Raises ``UserError`` that names what cannot be, ``KeyError`` for what is missing."""
        section(data, "space")
        choices, lanes = section(data["choices"], "space.choices"), section(data["lanes"], "space.lanes")
        per_layer = listed(data["per_layer"], "space.per_layer")
        order = whole_numbers(data["layer_order"], "space.layer_order", 0, MOST_LAYERS)
        if odd := [axis for axis in per_layer if not isinstance(axis, str)]:
            raise UserError(f"space.per_layer: {shown(odd[0])} is no axis")
        return cls.build(
            ParentShape.from_dict(section(data["parent"], "space.parent")),
            {a: whole_numbers(w, f"space.choices.{a}", 1, 1 << 40) for a, w in choices.items()},
            {a: whole_number(n, f"space.lanes.{a}", 1, 1 << 40) for a, n in lanes.items()},
            per_layer=per_layer,
            layer_order=order,
        )


def _check_axis(name: str, parent: ParentShape) -> None:
    if name not in AXIS_NAMES:
        raise UserError(f"space: unknown axis {shown(name)}; known axes: {', '.join(AXIS_NAMES)}")
    if not parent.size(name):
        raise UserError(f"space: {name} is elastic, but {parent.hybrid_layer_pattern!r} has no such layer")


def _lanes(name: str, parent: ParentShape, asked: int | None) -> int:
    """Lanes of an axis: the asked number where structure allows it, else the structural one."""
    groups = parent.groups(name)
    if asked is None:
        return groups
    if name in ("hidden_size", "num_layers", "mamba_head_dim", "mamba_state_dim") and asked != 1:
        raise UserError(f"space.lanes.{name}={asked}: this axis is never sharded and has one lane; remove it")
    if name == "mamba_num_heads" and asked != groups:
        raise UserError(f"space.lanes.{name}={asked}: Mamba heads have one lane per SSM group ({groups})")
    if asked < 1 or asked % groups or parent.size(name) % asked:
        raise UserError(
            f"space.lanes.{name}={asked} must be a multiple of {groups} and divide {parent.size(name)}"
        )
    return asked


def _check_widths(name: str, widths: Sequence[int], parent: ParentShape, step: int) -> None:
    full = parent.size(name)
    if full % step:
        raise UserError(f"space: {name}={full} of the parent is no multiple of {step} (lanes x granule)")
    floor = max(1, parent.moe_router_topk if name == "num_moe_experts" else 1)
    for w in widths:
        if w % step or not floor <= w <= full:
            low = max(-(-floor // step) * step, min(w // step * step, full))
            high = min(low + step, full)
            why = f"not a multiple of {step} (lanes x granule)" if w % step else f"outside {floor}..{full}"
            raise UserError(
                f"space.choices.{name}: {w} is {why}; nearest legal: {', '.join(map(str, sorted({low, high})))}"
            )
