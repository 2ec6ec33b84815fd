"""What a step of the GPU check is given, and what it tells: numbers, with or without limits."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Skipped(Exception):
    """A step cannot say anything here, and why."""


@dataclass(frozen=True)
class Step:
    """One step of the check.

    Args:
        name: for ``--only`` and the results.
        title: for people.
        function: ``module:function``, imported in the step's own process and called with a :class:`Bench`.
        seconds: after which its process is killed and the step has failed.
    """

    name: str
    title: str
    function: str
    seconds: float


@dataclass(frozen=True)
class Bench:
    """The workbench of one step.

    Every number is on the disk as soon as it is told, so that a crash leaves what was found before it.

    Args:
        findings: a file of JSON lines, to which it writes.
        scratch: a folder that all steps share, in their order.
        rehearse: on the CPU, at tiny shapes.
    """

    findings: Path
    scratch: Path
    rehearse: bool

    def at_most(self, what: str, value: float, limit: float, unit: str = "") -> None:
        """The step fails where ``value`` is above ``limit``, or not a number."""
        self._tell({"what": what, "value": value, "limit": limit, "unit": unit})

    def goal(self, what: str, value: float, limit: float, unit: str = "") -> None:
        """As ``at_most`` on a GPU; a rehearsal's time and memory are nobody's goal."""
        if self.rehearse:
            self.number(what, value, unit)
        else:
            self.at_most(what, value, limit, unit)

    def number(self, what: str, value: float, unit: str = "") -> None:
        """A number without a limit."""
        self._tell({"what": what, "value": value, "unit": unit})

    def says(self, what: str, text: str) -> None:
        self._tell({"what": what, "text": text})

    def stands_in(self, what: str) -> None:
        """``what`` of this machine ran in place of what a GPU would run."""
        self._tell({"with": what})

    def _tell(self, finding: dict[str, Any]) -> None:
        with open(self.findings, "a", encoding="utf-8") as file:
            file.write(json.dumps(finding) + "\n")


def share_of_limit(finding: dict[str, Any]) -> float:
    """A number by its limit: above 1 it fails. What is not a number is infinitely far."""
    value, limit = finding["value"], finding["limit"]
    if math.isnan(value) or value > limit:
        return math.inf if math.isnan(value) or limit <= 0 else value / limit
    return value / limit if limit > 0 else 0.0
