"""A submodel: integers per axis, one for the whole model or one per layer of the owning type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .axes import AXIS_NAMES
from .stated import section, shown, whole_number, whole_numbers

Width = int | tuple[int, ...]


@dataclass(frozen=True)
class SubmodelSpec:
    """Widths of the elastic axes, hashable and comparable: ``a <= b`` where a is nested in b.

    A tuple holds one width per *parent* layer of the axis' type, in model order, dropped layers included.
    Axes that are not mentioned are at the parent's full size.
    """

    widths: tuple[tuple[str, Width], ...] = ()

    @classmethod
    def of(cls, widths: Mapping[str, Width | list[int]]) -> SubmodelSpec:
        freeze = {a: tuple(w) if isinstance(w, list | tuple) else int(w) for a, w in widths.items()}
        return cls(tuple(sorted(freeze.items())))

    def __getitem__(self, axis: str) -> Width:
        return dict(self.widths)[axis]

    def get(self, axis: str, default: Width) -> Width:
        return dict(self.widths).get(axis, default)

    def __contains__(self, axis: str) -> bool:
        return any(a == axis for a, _ in self.widths)

    def __iter__(self) -> Iterator[str]:
        return (a for a, _ in self.widths)

    def at(self, axis: str, position: int) -> int:
        """Width of ``axis`` in the ``position``-th layer of its type."""
        width = self[axis]
        return width[position] if isinstance(width, tuple) else width

    def __le__(self, other: SubmodelSpec) -> bool:
        return set(self) == set(other) and not self.wider_than(other)

    def wider_than(self, other: SubmodelSpec) -> tuple[str, ...]:
        """Axes of both on which this one keeps more, in some layer."""

        def wider(axis: str) -> bool:
            mine, theirs = self[axis], other[axis]
            length = max(len(w) if isinstance(w, tuple) else 1 for w in (mine, theirs))
            return any(self.at(axis, i) > other.at(axis, i) for i in range(length))

        return tuple(axis for axis in self if axis in other and wider(axis))

    @property
    def heterogeneous(self) -> tuple[str, ...]:
        """Axes whose width really differs between layers."""
        return tuple(a for a, w in self.widths if isinstance(w, tuple) and len(set(w)) > 1)

    def to_dict(self) -> dict[str, int | list[int]]:
        return {a: list(w) if isinstance(w, tuple) else w for a, w in self.widths}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SubmodelSpec:
        """Inverse of ``to_dict``. Raises ``UserError`` for what is no axis or no width."""
        if unknown := sorted(set(section(data, "a submodel")) - set(AXIS_NAMES)):
            raise UserError(f"{shown(unknown[0])} is no axis")
        for name, width in data.items():
            check = whole_numbers if isinstance(width, list) else whole_number
            check(width, name, 1, 1 << 40)
        return cls.of(data)
