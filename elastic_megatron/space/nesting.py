"""Which sizes of a family are part of which, in words: a router may choose a smaller size that is wider somewhere."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from .submodel import SubmodelSpec


def apart(family: Mapping[str, SubmodelSpec]) -> list[str]:
    """A line for each pair of sizes of which neither is part of the other; none where the family is nested."""
    lines: list[str] = []
    for (a, first), (b, then) in combinations(family.items(), 2):
        if not (first <= then or then <= first):
            # named as the smaller one: the one that is wider on fewer axes, else the later one
            later = len(then.wider_than(first)) <= len(first.wider_than(then))
            inner, outer = (b, a) if later else (a, b)
            lines.append(not_part(inner, family[inner], outer, family[outer]))
    return lines


def not_part(name: str, spec: SubmodelSpec, outer: str, of: SubmodelSpec) -> str:
    """Why a size is not part of another one, which it is not."""
    assert not spec <= of
    more = ", ".join(f"{axis} {_width(spec, axis)}, not {_width(of, axis)}" for axis in spec.wider_than(of))
    return (
        f"{name} is not part of {outer}: it has more ({more})" if more else f"{name} is not part of {outer}"
    )


def _width(spec: SubmodelSpec, axis: str) -> str:
    width = spec[axis]
    if not isinstance(width, tuple) or len(set(width)) == 1:
        return str(spec.at(axis, 0))
    return f"{min(width)} to {max(width)} by layer"
