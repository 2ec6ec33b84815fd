"""A sample of each study, by the code of ``run.py``; the whole of them takes half an hour (``make faults``)."""

from __future__ import annotations

import pickle
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import disk_study
import kill_study
import mutate_study
import pytest
import race_study
from binary_mutations import pickle_code
from fault_cases import CASES
from moments import Strike
from tally import Lanes, Tally
from worlds import build
from zygote import Run, Zygote

SEED = 7


@pytest.fixture(scope="module")
def lanes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lanes]:
    """One warm process, and the world."""
    root = tmp_path_factory.mktemp("faults")
    with Zygote() as zygote:
        yield Lanes(build(zygote, root / "world"), [zygote], root)


def assert_kept(study: Callable[[Tally], None], trials: int) -> Tally:
    tally = Tally()
    study(tally)
    assert tally.trials >= trials
    assert not tally.faults, "\n".join(map(str, tally.faults))
    return tally


def test_commands_that_die_are_finished_by_the_same_command(lanes: Lanes) -> None:
    """KILL, TERM and INT at calls to the file system and by the clock; then the bytes of an undisturbed run."""
    assert_kept(
        lambda tally: kill_study.study(lanes, kill_study.SAMPLE, SEED, tally), sum(kill_study.SAMPLE.values())
    )


def test_broken_disks_are_one_line_and_lose_nothing(lanes: Lanes) -> None:
    """Errors of the file system at calls; then the same command, without the fault."""
    sample = disk_study.SAMPLE
    assert_kept(lambda tally: disk_study.study(lanes, sample, SEED, tally, real=False), sum(sample.values()))


def test_two_writers_of_one_target_leave_the_work_of_one(lanes: Lanes) -> None:
    """At once, or one held still in the midst of its writing."""
    assert_kept(
        lambda tally: race_study.study(lanes, race_study.SAMPLE, SEED, tally), sum(race_study.SAMPLE.values())
    )


def test_damaged_and_hostile_files_run_no_code_and_are_refused_in_one_line(lanes: Lanes) -> None:
    """Every format, by mutations that know it; within seconds and bounded memory."""
    sample = mutate_study.SAMPLE
    tally = assert_kept(lambda tally: mutate_study.study(lanes, sample, SEED, tally), sum(sample.values()))
    assert sum(row["refused"] for row in tally.rows.values()) > sum(sample.values()) // 2


@pytest.mark.parametrize("call", [1, 10])
def test_a_signal_strikes_at_the_call_that_was_meant(lanes: Lanes, call: int) -> None:
    """The harness itself: it is told which call that was, and there is no later one."""
    lane, case = lanes.first, CASES["export one"]
    folder = case.prepare(lane.world, lane.folder)
    [ran] = lane.zygote.run(case.run(lane.world, folder, strike=Strike("signal", call, signal.SIGKILL)))
    assert (ran.status, ran.calls, bool(ran.struck)) == (-signal.SIGKILL, call, True)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("seed", range(8))
def test_code_in_a_file_would_be_noticed(lanes: Lanes, seed: int, tmp_path: Path) -> None:
    """The marker of the mutation study appears where a reader runs a pickle."""
    file, mark = tmp_path / "victim", tmp_path / mutate_study.MARKED
    file.write_bytes(pickle.dumps(None))
    pickle_code(file, random.Random(seed))
    lanes.first.zygote.run(
        Run(["test_faults:unpickle", str(file)], str(tmp_path), {"FAULTS_MARK": str(mark)})
    )
    assert mark.exists()


def unpickle(file: str) -> None:
    """What no reader of ours does; in the zygote."""
    pickle.loads(Path(file).read_bytes())
