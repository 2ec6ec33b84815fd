"""Steps whose loss stands out of those before it."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from ..recipe.objective import Loss

# a standard deviation of normal noise over its median absolute deviation
_NORMAL = 1.4826
# of the median: noise below it is taken for this much
_LEAST = 1e-3


class Spikes:
    """Robust z-scores of losses: (loss - median) / (1.4826 x median absolute deviation) over the steps before.

    Stages and budgets have losses of their own height, so that each has a window of its own. Iglewicz and Hoaglin, How
    to Detect and Handle Outliers (1993).
    """

    def __init__(self, settings: Loss) -> None:
        self.settings = settings
        self._windows: dict[tuple[Any, ...], deque[float]] = {}

    def forget(self) -> None:
        """The run goes on from another place."""
        self._windows.clear()

    def seen(self, line: Mapping[str, Any]) -> float | None:
        """The score of a step's line of metrics, where it is a spike; the line counts for those after it."""
        size, loss, budget = self.settings.spike_window, line.get("loss"), line.get("budget")
        if not size or loss is None or not line.get("updated", True):
            return None
        key = line.get("stage"), budget if isinstance(budget, str) else None
        window = self._windows.setdefault(key, deque(maxlen=size))
        score = _score(loss, window) if 2 * len(window) >= size else 0.0
        window.append(loss)
        return score if score > self.settings.spike_threshold else None


def _score(loss: float, window: deque[float]) -> float:
    middle = statistics.median(window)
    deviation = statistics.median(abs(value - middle) for value in window)
    scale = max(_NORMAL * deviation, _LEAST * abs(middle))
    return (loss - middle) / scale if scale else 0.0
