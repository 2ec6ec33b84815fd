"""Which rows of a source tensor are read: those that are needed, and gaps that are cheaper to read than to skip."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic_megatron.conversion.copy import _needed

ROWS = st.sets(st.integers(0, 40), min_size=1)


def use(rows: set[int] | None) -> tuple[int, Any]:
    return 0, Mock(rows=None if rows is None else torch.tensor(sorted(rows, reverse=True)))


@given(st.lists(ROWS, min_size=1, max_size=3), st.integers(0, 6))
def test_gaps_are_closed_up_to_their_limit(uses: list[set[int]], gap: int) -> None:
    wanted = sorted(set().union(*uses))
    stretches = _needed(41, [use(rows) for rows in uses], gap)
    covered = [row for first, last in stretches for row in range(first, last)]
    assert covered == sorted(set(covered)) and set(wanted) <= set(covered)
    assert {first for first, _ in stretches} | {last - 1 for _, last in stretches} <= set(wanted)
    skipped = [b - a - 1 for a, b in pairwise(wanted)]
    assert len(stretches) == 1 + sum(n > gap for n in skipped), "longer gaps part stretches, and no others do"
    assert all(b[0] - a[1] > gap for a, b in pairwise(stretches))


def test_a_use_of_all_rows_reads_all() -> None:
    assert _needed(41, [use({3}), use(None)], 0) == [(0, 41)]
