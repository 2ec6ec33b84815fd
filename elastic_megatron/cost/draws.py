"""How often each budget is trained on."""

from __future__ import annotations

from collections.abc import Sequence


def chances(probs: Sequence[float], count: int) -> list[float]:
    """The probability of each value to be among ``count`` different ones: min(1, c p_i), where c makes them sum to it.

    Args:
        probs: of the values, were one drawn.
        count: at least 1, and no more than values that can be drawn.
    """
    sure: set[int] = set()
    while True:
        rest = sum(p for i, p in enumerate(probs) if i not in sure)
        factor = (count - len(sure)) / rest if rest else 0.0
        over = {i for i, p in enumerate(probs) if i not in sure and p > 0 and factor * p >= 1}
        if not over:
            return [1.0 if i in sure else factor * p for i, p in enumerate(probs)]
        sure |= over
