"""Ranks hold a run folder together: one has the lock, and all hear of it."""

from __future__ import annotations

import os
from pathlib import Path

import folder_jobs
import pytest
from pool import RankPool

from elastic_megatron.errors import BAD_INPUT
from elastic_megatron.files import lock

pytestmark = pytest.mark.usefixtures("megatron")


def test_all_ranks_are_told_who_holds_their_folder(ranks: RankPool, tmp_path: Path) -> None:
    with lock.locked(lock.within(tmp_path / "run"), "the first"):
        told = ranks.run(folder_jobs.hold, 2, str(tmp_path / "run"))
    assert len({*told}) == 1 and "\n" not in told[0]
    assert f"held by the first (process {os.getpid()} on " in told[0]
    (owner,) = {*ranks.run(folder_jobs.hold, 2, str(tmp_path / "run"))}
    assert owner.startswith("train (process ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_all_ranks_leave_a_folder_that_was_removed(ranks: RankPool, tmp_path: Path, async_save: bool) -> None:
    """None of them makes it again."""
    (told,) = {*ranks.run(folder_jobs.save_into_removed, 2, str(tmp_path / "run"), async_save)}
    assert told.startswith(f"{BAD_INPUT}: ") and "was removed while train was running" in told
    assert list(tmp_path.iterdir()) == []
