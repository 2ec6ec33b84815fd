"""One writer per folder: of any number that try at once, exactly one holds the lock; a dead owner's is taken over."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import NoReturn

import pytest

from elastic_megatron.errors import UserError
from elastic_megatron.files import lock, process
from elastic_megatron.files.owner import STALE, myself

# adds 1 to a counter, which only one at a time may do; a lost lock race loses a count
CONTENDER = """
import sys, time
from pathlib import Path
from elastic_megatron.errors import UserError
from elastic_megatron.files import lock
folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
for _ in range(rounds):
    while True:
        try:
            with lock.locked(lock.within(folder), "count"):
                counter = folder / "counter"
                n = int(counter.read_text())
                time.sleep(0.002)
                counter.write_text(str(n + 1))
            break
        except UserError:
            time.sleep(0.001)
"""
DIES = """
import os, signal, sys
from pathlib import Path
from elastic_megatron.files import lock
lock.acquire(lock.within(Path(sys.argv[1])), "train")
os.kill(os.getpid(), signal.SIGKILL)
"""


UNORDERED = """
import errno, fcntl
def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = flock
"""


def spawned(program: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )


def test_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0")
    contenders = [spawned(CONTENDER, tmp_path, 25) for _ in range(4)]
    for contender in contenders:
        assert contender.wait(timeout=120) == 0, contender.stderr and contender.stderr.read()
    assert (tmp_path / "counter").read_text() == "100"
    assert [p.name for p in tmp_path.iterdir()] == ["counter"]


@pytest.mark.parametrize("before", ["", UNORDERED], ids=["in a row", "without kernel locks"])
def test_a_dead_owners_lock_is_taken_over_by_one(tmp_path: Path, before: str) -> None:
    assert spawned(DIES, tmp_path).wait(timeout=60) == -9
    assert lock.living_owner(lock.within(tmp_path)) is None
    (tmp_path / "counter").write_text("0")
    contenders = [spawned(before + CONTENDER, tmp_path, 5) for _ in range(4)]
    said = "".join(contender.communicate(timeout=120)[1] for contender in contenders)
    assert (tmp_path / "counter").read_text() == "20"
    assert said.count("taken over from train (process") == 1


def test_the_second_is_told_who_is_first(tmp_path: Path) -> None:
    with (
        lock.locked(lock.beside(tmp_path / "out"), "export") as held,
        pytest.raises(UserError, match=rf"held by export \(process {os.getpid()} on .*, since 20"),
        lock.locked(lock.beside(tmp_path / "out"), "slice"),
    ):
        pass
    assert lock.owner_of(held.file) is None


ELSEWHERE = {"space": "another boot", "host": "elsewhere", "token": "1" * 16}


def left_by(file: Path, age: float = 0.0, **known: str) -> None:
    owner = replace(myself("train"), **{**ELSEWHERE, **known})
    file.write_text(json.dumps(asdict(owner)))
    stamp = file.stat().st_mtime - age
    os.utime(file, (stamp, stamp))


def test_owners_elsewhere_live_as_long_as_their_stamp_is_fresh(tmp_path: Path) -> None:
    file = lock.within(tmp_path)
    left_by(file, age=STALE / 2)
    with pytest.raises(UserError, match="on elsewhere"):
        lock.acquire(file, "train")
    left_by(file, age=STALE * 1.1)
    lock.acquire(file, "train").release()


def test_a_requeued_job_takes_over_from_its_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = lock.within(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    left_by(file)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock.acquire(file, "train").release()


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"pid": "../../etc"}', "\0\xff"])
def test_a_damaged_lock_is_nobodys_and_grows_stale(tmp_path: Path, damage: str) -> None:
    file = lock.within(tmp_path)
    file.write_text(damage)
    with pytest.raises(UserError, match="an unknown command"):
        lock.acquire(file, "train")
    os.utime(file, (1, 1))
    lock.acquire(file, "train").release()


def test_an_owner_notices_what_became_of_its_lock(tmp_path: Path) -> None:
    held = lock.acquire(lock.within(tmp_path), "train")
    held.check()
    left_by(held.file)
    with pytest.raises(UserError, match="taken over by train"):
        held.check()
    held.release()
    assert held.file.exists()
    held.file.unlink()
    with pytest.raises(UserError, match="was removed while train was running"):
        held.check()


@pytest.mark.parametrize("hidden", [ProcessLookupError, PermissionError])
def test_a_process_that_is_not_shown_may_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: type[OSError]
) -> None:
    """Where /proc shows only one's own processes, another user's is known to be there, and the stamp decides."""
    file = lock.within(tmp_path)
    left_by(file, space=process.space(), started="1")
    monkeypatch.setattr(process, "start_of", lambda pid: None)

    def kill(*_: object) -> NoReturn:
        raise hidden

    monkeypatch.setattr(os, "kill", kill)
    assert (lock.living_owner(file) is None) == (hidden is ProcessLookupError)


def test_what_was_made_for_a_lock_goes_with_it(tmp_path: Path) -> None:
    with lock.locked(lock.beside(tmp_path / "a/b/out"), "export"):
        pass
    assert list(tmp_path.iterdir()) == []
    with lock.locked(lock.within(tmp_path / "a/run"), "train"):
        (tmp_path / "a/kept").touch()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["kept"]


def test_a_path_has_one_lock_whatever_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    names = [Path("."), Path("../real"), tmp_path / "link", tmp_path / "real"]
    assert {lock.beside(name) for name in names} == {tmp_path / ".real.lock"}
    assert {lock.beside(name / "x") for name in names} == {tmp_path / "real/.x.lock"}


def test_a_lost_answer_is_no_lost_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS repeats a request whose answer was lost, and then says that the name is there already."""
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    held = lock.acquire(lock.within(tmp_path), "train")
    held.check()
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_take_over_without_kernel_locks_one_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have seen that the owner is dead, and both replace the file."""
    file = lock.within(tmp_path)
    left_by(file, age=STALE * 2)
    dead, together = lock.owner_of(file), threading.Barrier(2)
    assert dead is not None

    def flock(*_: object) -> NoReturn:
        together.wait(60)
        raise OSError(errno.ENOLCK, "No locks available")

    replace_, slow = os.replace, threading.Event()

    def replaced(source: Path, target: Path) -> None:
        together.wait(60)
        if threading.current_thread() is threads[1]:
            slow.wait(0.3)
        replace_(source, target)

    monkeypatch.setattr("fcntl.flock", flock)
    monkeypatch.setattr(os, "replace", replaced)
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append(lock._taken_over(file, dead, myself("train"))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(found) == [False, True]


def test_without_hard_links_there_is_one_owner_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> NoReturn:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with (
        lock.locked(lock.within(tmp_path), "train") as held,
        pytest.raises(UserError, match="held by train"),
        lock.locked(lock.within(tmp_path), "rank"),
    ):
        held.check()
    assert list(tmp_path.iterdir()) == []


def made_into(kind: str, file: Path) -> None:
    {"fifo": os.mkfifo, "folder": os.mkdir, "link": lambda f: f.symlink_to("nowhere")}[kind](file)


@pytest.mark.parametrize("kind", ["fifo", "folder", "link"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    file = lock.within(tmp_path)
    made_into(kind, file)
    with pytest.raises(UserError, match="an unknown command|is a link"):
        lock.acquire(file, "train")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for file in (lock.within(tmp_path / "file"), lock.within(Path("/proc/none"))):
        with pytest.raises(OSError, match=rf"'{file.parent}'"):
            lock.acquire(file, "train")


def test_the_stamp_moves_while_the_owner_lives_and_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.01)
    held = lock.acquire(lock.within(tmp_path), "train")
    os.utime(held.file, (1, 1))
    deadline = time.monotonic() + 60
    while held.file.stat().st_mtime == 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert held.file.stat().st_mtime != 1
    left_by(held.file)
    os.utime(held.file, (1, 1))
    time.sleep(0.2)
    assert held.file.stat().st_mtime == 1
    held.release()


def test_the_patient_wait_and_say_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = lock.acquire(lock.within(tmp_path), "build")
    threading.Timer(0.7, held.release).start()
    lock.acquire(lock.within(tmp_path), "build", patience=60).release()
    assert capsys.readouterr().err.count("waiting for it") == 1


def test_a_job_waits_for_an_owner_elsewhere_until_it_is_known_to_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lock.within(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "18")
    left_by(file, age=STALE - 1, job="17")
    lock.acquire(file, "train").release()
    assert "waiting for it" in capsys.readouterr().err

    left_by(file, age=1, job="17")
    threading.Timer(0.7, lambda: os.utime(file)).start()
    with pytest.raises(UserError, match="held by train"):
        lock.acquire(file, "train")


def test_a_file_server_that_does_not_answer_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = lock.acquire(lock.within(tmp_path), "train")

    def read(file: Path) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(lock, "read", read)
        held.check()
    held.release()


def test_a_forked_child_gives_nothing_back(tmp_path: Path) -> None:
    held = lock.acquire(lock.within(tmp_path), "train")
    if (child := os.fork()) == 0:
        held.release()
        os._exit(0)
    os.waitpid(child, 0)
    held.check()
    held.release()
