"""One writer per folder: of any number that try at once, exactly one holds the lock; a dead owner's is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from elastic_megatron.errors import UserError
from elastic_megatron.files import lock

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


def test_a_dead_owners_lock_is_taken_over_by_one(tmp_path: Path) -> None:
    assert spawned(DIES, tmp_path).wait(timeout=60) == -9
    assert lock.living_owner(lock.within(tmp_path)) is None
    (tmp_path / "counter").write_text("0")
    contenders = [spawned(CONTENDER, tmp_path, 5) for _ in range(4)]
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
    owner = replace(lock._myself("train"), **{**ELSEWHERE, **known})
    file.write_text(json.dumps(asdict(owner)))
    stamp = file.stat().st_mtime - age
    os.utime(file, (stamp, stamp))


def test_owners_elsewhere_live_as_long_as_their_stamp_is_fresh(tmp_path: Path) -> None:
    file = lock.within(tmp_path)
    left_by(file, age=lock.STALE / 2)
    with pytest.raises(UserError, match="on elsewhere"):
        lock.acquire(file, "train")
    left_by(file, age=lock.STALE * 1.1)
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
