"""A teacher's cache: no teacher in memory where it has everything, and room for what it will hold."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from chain_files import SHAPE, findings, remedies, write_chain

from elastic_megatron.preflight.disk import wanted
from elastic_megatron.preflight.family import Families
from elastic_megatron.recipe import load_jobs


@pytest.mark.parametrize("only", [False, True])
def test_a_cache_that_has_everything_saves_the_teacher(tmp_path: Path, only: bool) -> None:
    keys = [f"train.teacher.cache={tmp_path}/cache", f"train.teacher.cache_only={str(only).lower()}"]
    chain = load_jobs(write_chain(tmp_path), keys)
    assert Families(chain).of(chain.job("train")).teacher == (None if only else SHAPE)


def room(path: Path, *keys: str) -> int:
    """Bytes that a chain will write to its disk."""
    chain = load_jobs(path, list(keys))
    return sum(wanted(chain, Families(chain), {"train": 2}).values())


def test_a_cache_takes_six_bytes_an_entry_and_four_a_token(tmp_path: Path) -> None:
    path, cache = write_chain(tmp_path), f"train.teacher.cache={tmp_path}/cache"
    without = room(path)
    tokens = 31 * 32 * 1024 + 16 * 16 * 4096  # whole steps of both stages
    assert room(path, cache) - without == tokens * (6 * 64 + 4)
    assert room(path, cache, "train.teacher.top_k=10000") - without == tokens * (6 * 4096 + 4), "all entries"
    assert room(path, cache, "train.stop_after=short") - without == 31 * 32 * 1024 * 388
    assert room(path, cache, "train.teacher.cache_only=true") == without
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "records").write_bytes(bytes(1000))
    assert room(path, cache) - without == tokens * 388 - 1000, "what is there is not written again"


def test_the_folder_of_a_cache_is_looked_at(tmp_path: Path) -> None:
    path, folder = write_chain(tmp_path), tmp_path / "cache" / "of" / "parent"
    keys = [f"train.teacher.cache={folder}", "train.teacher.cache_only=true"]
    (found,) = findings(path, *keys)
    assert found.job == "train" and found.text.startswith(f"teacher.cache: {folder} holds nothing")
    for way in remedies(found):
        assert findings(path, *keys, *way) == []
    (tmp_path / "cache").touch()
    (found,) = findings(path, keys[0])
    assert found.text.startswith(f"teacher.cache: {tmp_path}/cache cannot be written to")
    (tmp_path / "cache").unlink()
    folder.mkdir(parents=True)
    (folder / "teacher.json").touch()
    assert findings(path, *keys) == []


def test_a_disk_that_is_too_small_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, cache = write_chain(tmp_path), f"train.teacher.cache={tmp_path}/cache"
    free = room(path)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**50, 0, free))
    assert findings(path) == []
    (found,) = findings(path, cache)
    assert found.severity == "error" and "a smaller teacher.top_k, or another disk" in found.text
