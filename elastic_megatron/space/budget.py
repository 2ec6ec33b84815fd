"""A budget: a named size target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

METRICS = ("active_params", "total_params", "memory_bytes", "latency")
UNITS = ("ratio", "absolute")


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
        assert self.metric in METRICS and self.unit in UNITS and self.target > 0

    @property
    def full(self) -> bool:
        """Does this budget ask for the parent itself?"""
        return self.unit == "ratio" and self.target == 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Budget:
        return cls(**data)
