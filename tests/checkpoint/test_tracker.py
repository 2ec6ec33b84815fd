"""A checkpoint root names a complete checkpoint at every moment; here one is a folder that says which save wrote it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_megatron.checkpoint import tracker
from elastic_megatron.checkpoint.manifest import FILE
from elastic_megatron.files import writing


def begin(root: Path, iteration: int, content: int) -> None:
    tracker.begin(root, iteration)
    folder = tracker.temporary(root, iteration)
    (folder / "shard").write_text(str(content))
    (folder / FILE).write_text(str(content))


def fake_save(root: Path, iteration: int, content: int, keep_last: int = 0) -> None:
    begin(root, iteration, content)
    tracker.publish(root, iteration)
    tracker.prune(root, keep_last)


def content_of(root: Path) -> int:
    """Which save the named checkpoint is of, all its files agreeing."""
    named = tracker.newest(root)
    assert named is not None
    found = {(named / name).read_text() for name in ("shard", FILE)}
    assert len(found) == 1
    return int(found.pop())


class PowerFailure(Exception):
    pass


@contextmanager
def power_failure(at: int) -> Iterator[list[str]]:
    """Everything stops at the ``at``-th change of a name on disk; a tree that is removed stops half removed."""
    done: list[str] = []

    def stop(name: str) -> None:
        if len(done) >= at:
            raise PowerFailure
        done.append(name)

    def before(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            stop(name)
            return function(*args, **kwargs)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, before(name, getattr(os, name)))
        yield done


HISTORIES: dict[str, list[tuple[int, int]]] = {
    "the first": [],
    "the next": [(1, 10)],
    "over the named one": [(1, 10), (2, 20)],
    "over the only one": [(2, 20)],
    "over a later one": [(1, 10), (3, 30), (2, 20)],
}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
@pytest.mark.parametrize("keep_last", [0, 1, 2])
def test_stopped_at_any_change_of_a_name_a_root_names_the_old_or_the_new_checkpoint(
    tmp_path: Path, history: list[tuple[int, int]], keep_last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the save after that succeeds over the remains, and leaves none."""
    monkeypatch.setattr(writing, "ended", lambda _: True)  # the process that the power failed
    for at in range(1000):
        root = tmp_path / str(at)
        for iteration, content in history:
            fake_save(root, iteration, content)
        allowed = {history[-1][1] if history else None, 99}
        ended = False
        with power_failure(at) as done:
            try:
                fake_save(root, 2, 99, keep_last)
                ended = True
            except PowerFailure:
                pass
        found = content_of(root) if (root / tracker.TRACKER).exists() else None
        assert found in allowed, (at, done)
        assert not ended or found == 99
        for folder in tracker.complete(root):
            assert (folder / "shard").read_text() == (folder / FILE).read_text(), (at, done)
        fake_save(root, 4, 44, keep_last)
        assert content_of(root) == 44
        assert not [p.name for p in root.iterdir() if p.name.startswith(".")], (at, done)
        if ended:
            assert len(done) == at >= 3
            return
    raise AssertionError("the save never ended")


@given(
    iterations=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    keep_last=st.integers(0, 4),
)
@settings(max_examples=40)
def test_the_checkpoint_just_saved_and_those_before_it_are_kept(
    tmp_path_factory: pytest.TempPathFactory, iterations: list[int], keep_last: int
) -> None:
    """Also when a run was set back to an older iteration, whose successors are then overwritten one by one."""
    root = tmp_path_factory.mktemp("kept")
    there: set[int] = set()
    for content, iteration in enumerate(iterations):
        fake_save(root, iteration, content, keep_last)
        there.add(iteration)
        past = sorted(i for i in there if i <= iteration)
        there -= set(past[:-keep_last] if keep_last else ())
        assert content_of(root) == content
        assert [int(p.name[5:]) for p in tracker.complete(root)] == sorted(there)
    assert not list(root.glob(".iter_*"))


def test_folders_of_dead_saves_go_with_the_next_one_and_the_users_stay(tmp_path: Path) -> None:
    begin(tmp_path, 3, 30)
    begin(tmp_path, 5, 50)
    assert [p.name for p in tmp_path.iterdir()] == [".iter_0000005.incomplete"]
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "iter_best").mkdir()
    fake_save(tmp_path, 4, 40, keep_last=1)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["iter_0000004", "iter_best", tracker.TRACKER, "notes.txt"]


BUSY = ("held", ".nfs0001")


@contextmanager
def busy() -> Iterator[None]:
    """Files of these names cannot be removed: as what is mounted, and as what NFS leaves of a file that is open."""
    unlink = os.unlink

    def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
        if os.path.basename(path) in BUSY:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        unlink(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        yield


@given(iterations=st.lists(st.integers(0, 4), min_size=2, max_size=8), keep_last=st.integers(0, 3))
@settings(max_examples=40)
def test_what_cannot_be_removed_never_fails_a_save_and_goes_with_a_later_one(
    tmp_path_factory: pytest.TempPathFactory, iterations: list[int], keep_last: int
) -> None:
    """Every save ends as if it could: what is named is whole, what is gone is not complete, and no other is lost."""
    root, free = tmp_path_factory.mktemp("busy"), tmp_path_factory.mktemp("free")
    for content, iteration in enumerate(iterations):
        with busy():
            begin(root, iteration, content)
            for name in BUSY:
                (tracker.temporary(root, iteration) / name).touch()
            tracker.publish(root, iteration)
            tracker.prune(root, keep_last)
        fake_save(free, iteration, content, keep_last)
        assert content_of(root) == content
        assert [p.name for p in tracker.complete(root)] == [p.name for p in tracker.complete(free)]
    fake_save(root, 9, 99, keep_last)
    assert not list(root.glob(".iter_*"))


def test_a_removal_that_failed_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_save(tmp_path, 1, 10)
    (tmp_path / "iter_0000001" / "held").touch()
    with busy():
        fake_save(tmp_path, 2, 20, keep_last=1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "iter_0000001" in said[0] and "the next save tries again" in said[0]


def test_a_checkpoint_that_cannot_be_renamed_stays_complete(tmp_path: Path) -> None:
    """It is a mount itself; the save that would have pruned it has succeeded all the same."""
    fake_save(tmp_path, 1, 10)
    rename = os.rename

    def refuse(source: Any, target: Any, **kwargs: Any) -> None:
        if Path(source).name == "iter_0000001":
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), source)
        rename(source, target, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        fake_save(tmp_path, 2, 20, keep_last=1)
    assert content_of(tmp_path) == 20
    assert [p.name for p in tracker.complete(tmp_path)] == ["iter_0000001", "iter_0000002"]
    fake_save(tmp_path, 3, 30, keep_last=1)
    assert [p.name for p in tracker.complete(tmp_path)] == ["iter_0000003"]


def test_of_a_link_to_a_checkpoint_the_link_is_pruned(tmp_path: Path) -> None:
    """Who moved an old checkpoint to another disk keeps it there."""
    root, archive = tmp_path / "root", tmp_path / "archive"
    fake_save(root, 1, 10)
    shutil.move(root / "iter_0000001", archive)
    (root / "iter_0000001").symlink_to(archive)
    fake_save(root, 2, 20, keep_last=1)
    assert sorted(p.name for p in root.iterdir()) == ["iter_0000002", tracker.TRACKER]
    assert (archive / FILE).read_text() == "10"


def test_what_a_crash_left_of_the_same_number_may_be_busy_too(tmp_path: Path) -> None:
    """Killed between two names, a save leaves the one that it replaced beside the new one."""
    fake_save(tmp_path, 2, 20)
    shutil.copytree(tmp_path / "iter_0000002", tmp_path / ".iter_0000002.replaced")
    (tmp_path / ".iter_0000002.replaced" / "held").touch()
    with busy():
        fake_save(tmp_path, 2, 21)
    assert content_of(tmp_path) == 21
    fake_save(tmp_path, 3, 30)
    assert not list(tmp_path.glob(".iter_*"))
