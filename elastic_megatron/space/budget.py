"""A budget: a named size target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import UserError
from .stated import checked_name, is_finite, section, shown, whole_number

METRICS = ("active_params", "total_params", "memory_bytes", "latency")
UNITS = ("ratio", "absolute")
FORMATS = ("bf16", "fp8", "nvfp4")


@dataclass(frozen=True)
class Budget:
    """``target`` of ``metric``: a fraction of the parent's (``ratio``) or its own unit (``absolute``:
    parameters, bytes or seconds). The remaining fields belong to one metric each: memory is priced with
    ``format``, ``sequence_length`` and ``batch_size``; latency is read from the measured table ``table``.
    """

    name: str
    metric: str
    target: float
    unit: str = "ratio"
    format: str = "bf16"
    sequence_length: int = 8192
    batch_size: int = 1
    table: str | None = None

    def __post_init__(self) -> None:
        assert self.metric in METRICS and self.unit in UNITS and is_finite(self.target) and self.target > 0

    @property
    def full(self) -> bool:
        """Does this budget ask for the parent itself?"""
        return self.unit == "ratio" and self.target == 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Budget:
        """Inverse of ``to_dict``. Raises ``UserError`` that names the field that cannot be."""
        name = checked_name(section(data, "a budget").get("name"), "budget")
        if unknown := sorted(set(data) - {f.name for f in fields(cls)}):
            raise UserError(f"budget {name}: {shown(unknown[0])} is no field of a budget")
        legal = {"metric": METRICS, "unit": UNITS, "format": FORMATS}
        for field, known in legal.items():
            if data.get(field, known[0]) not in known:
                raise UserError(f"budget {name}: {field} is {shown(data[field])}; known: {', '.join(known)}")
        if not is_finite(target := data.get("target", 0)) or target <= 0:
            raise UserError(f"budget {name}: target is {shown(target)}; it must be a number above 0")
        for field in ("sequence_length", "batch_size"):
            whole_number(data.get(field, 1), f"budget {name}: {field}", 1, 1 << 40)
        table = data.get("table")
        if not isinstance(table, str | None) or (data.get("metric") == "latency") != (table is not None):
            raise UserError(
                f"budget {name}: table is {shown(table)}; a latency budget, and no other, names one"
            )
        return cls(**data)
