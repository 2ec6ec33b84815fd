"""A teacher's cache that was written under one layout is read under any other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cache_jobs
import pytest
from layouts import LAYOUTS, Layout
from pool import RankPool
from runs import BATCH, STEPS, per_draw
from test_training import compare

from elastic_megatron.data.record_files import listing

STAGE = {"budgets_per_batch": 2}


@pytest.fixture(scope="module")
def alone(
    write: Callable[..., Path], ranks: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    """The run in one process that filled a cache, and the cache."""
    cache = tmp_path_factory.mktemp("cache") / "alone"
    teacher = {"cache": str(cache), "top_k": 12}
    file = write("cache_alone", True, 1, {}, stage=STAGE, teacher=teacher)
    (found,) = ranks.run(cache_jobs.taught, 1, str(file), timeout=240)
    assert found["calls"] == STEPS * BATCH
    return found, cache


def test_what_one_process_stored_serves_a_pipeline(
    write: Callable[..., Path], alone: tuple[dict[str, Any], Path], ranks: RankPool, tmp_path: Path
) -> None:
    """Its stages have a teacher in memory, which none of them asks."""
    expected, original = alone
    cache = tmp_path / "cache"
    shutil.copytree(original, cache)
    layout, teacher = named("PP2+VPP2"), {"cache": str(cache), "top_k": 12}
    file = write("cache_read", True, 1, dict(layout.parallel), stage=STAGE, teacher=teacher)
    results = ranks.run(cache_jobs.taught, layout.world, str(file), timeout=240)
    compare(results, expected)
    assert not any(result["calls"] for result in results)
    assert listing(cache) == listing(original), "nothing was written"


def test_ranks_that_share_sequences_store_them_whole(
    write: Callable[..., Path], alone: tuple[dict[str, Any], Path], ranks: RankPool, tmp_path: Path
) -> None:
    expected, original = alone
    cache, layout = tmp_path / "cache", named("CP2")
    teacher = {"cache": str(cache), "top_k": 12}
    file = write("cache_fill", True, 1, dict(layout.parallel), stage=STAGE, teacher=teacher)
    compare(ranks.run(cache_jobs.taught, layout.world, str(file), timeout=240), expected)
    assert keys(cache) == keys(original) and len(keys(cache)) == len(set(keys(cache)))
    assert len(listing(cache)) == 1, "one writer"


def named(name: str) -> Layout:
    layout = next(layout for layout in LAYOUTS if layout.name == name)
    assert per_draw(layout) == 1
    return layout


def keys(cache: Path) -> list[bytes]:
    return sorted(both[i : i + 16] for _, both in listing(cache).values() for i in range(0, len(both), 16))
