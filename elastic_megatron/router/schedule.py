"""Schedules of the Gumbel temperature and the logit scale."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A value that moves from ``start`` to ``end`` over the whole run, geometrically or linearly.

    Nemotron Elastic (arXiv 2511.16664): tau 1.0 -> 0.05, logit scale 1 -> 10 linearly. The paper gives no
    law for tau; upstream multiplies by a constant each step, which is the geometric one.
    """

    start: float
    end: float
    geometric: bool = False

    def at(self, step: int, total_steps: int) -> float:
        """Value at ``step`` of ``total_steps`` (0-based; constant at ``end`` afterwards)."""
        done = min(max(step / max(total_steps - 1, 1), 0.0), 1.0)
        if self.geometric:
            return self.start * (self.end / self.start) ** done
        return self.start + (self.end - self.start) * done
