"""Commands that die at any moment: the same command then finishes with the bytes of an undisturbed run.

A trial lets a command die once to three times in one folder, each time by KILL, TERM or INT, at a call to the file
system or at a moment of the clock, and looks at what is left under final names; then the same command runs to its end.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fault_cases import CASES, Case, digest, json_lines, snapshot
from moments import Strike
from settled import check_finished, check_left, lock_left
from tally import Lane, Lanes, Tally
from zygote import Ran

# moments of a whole study, by command; those that take longest get least
MOMENTS = {
    "import": 30, "import elastic": 14, "export": 30, "export one": 14, "export quantised": 20, "slice": 30,
    "slice checkpoint": 14, "prepare-data": 14, "prepare-data split": 14, "prepare-data over": 10, "report": 8,
    "report quantised": 8, "rank": 24, "train": 40, "quantize": 24, "submit": 30,
}  # fmt: skip
SAMPLE = {"import": 2, "export": 2, "slice": 2, "prepare-data over": 2, "submit": 2, "quantize": 1}
_EXPECTED = {
    signal.SIGKILL: {-signal.SIGKILL},
    signal.SIGTERM: {-signal.SIGTERM, 128 + signal.SIGTERM},
    signal.SIGINT: {-signal.SIGINT, 128 + signal.SIGINT},
}


@dataclass(frozen=True)
class Undisturbed:
    """What a command leaves when nothing happens to it; its folder is kept."""

    folder: Path
    files: dict[str, str]
    metrics: list[dict[str, object]]
    calls: int
    wall: float


@dataclass(frozen=True)
class Death:
    """When and how: at a call or, where that is 0, at a share of the time that an undisturbed run takes."""

    number: signal.Signals
    call: int
    share: float

    def __str__(self) -> str:
        return (
            f"{self.number.name} at {f'call {self.call}' if self.call else f'{self.share:.0%} of its time'}"
        )


def study(lanes: Lanes, moments: dict[str, int], seed: int, tally: Tally) -> None:
    """So many deaths of each command."""
    rng = random.Random(seed)
    trials: list[Callable[[Lane], None]] = []
    for name, count in moments.items():
        case = CASES[name]
        straight = undisturbed(case, lanes.first)
        trials += [partial(_trial, case, straight, deaths, tally) for deaths in _drawn(straight, count, rng)]
    world = snapshot(lanes.first.world.root)
    lanes(trials)
    for name in {n for n, d in snapshot(lanes.first.world.root).items() if world.get(n) != d}:
        tally.fault("sources", "lost", "during the study", f"{name} changed")


def undisturbed(case: Case, lane: Lane) -> Undisturbed:
    folder = case.prepare(lane.world, lane.folder)
    [ran] = lane.zygote.run(case.run(lane.world, folder, strike=Strike("none")))
    assert ran.status == 0, f"{case.name}: {ran.status}\n{ran.err}"
    kept = folder.with_name(f"{case.name} undisturbed")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept, symlinks=True)
    return Undisturbed(kept, snapshot(folder), json_lines(folder / "run/metrics.jsonl"), ran.calls, ran.wall)


def _drawn(straight: Undisturbed, count: int, rng: random.Random) -> Iterator[tuple[Death, ...]]:
    """Deaths in groups of one to three; three of five at a call, spread over all of them."""
    calls = sorted(rng.sample(range(1, straight.calls + 1), min(count, straight.calls)))
    rng.shuffle(calls)
    left = count
    while left:
        group = min(left, rng.choice((1, 1, 2, 3)))
        left -= group
        yield tuple(
            Death(
                rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)),
                calls.pop() if calls and rng.random() < 0.6 else 0,
                rng.random(),
            )
            for _ in range(group)
        )


def _trial(case: Case, straight: Undisturbed, deaths: tuple[Death, ...], tally: Tally, lane: Lane) -> None:
    folder = case.prepare(lane.world, lane.folder)
    before = {name: digest(folder / name, folder) for name in straight.files if (folder / name).is_file()}
    history: list[str] = []
    for death in deaths:
        strike = Strike("signal", death.call, death.number) if death.call else Strike("none")
        after = None if death.call else death.share * straight.wall
        [ran] = lane.zygote.run(case.run(lane.world, folder, strike=strike, after=after, number=death.number))
        history.append(f"{death}{f' ({ran.struck})' if ran.struck else ''}")
        tally.count(case.name, death.number.name, "by call" if death.call else "by clock")
        moment = ", then ".join(history)
        if problem := _ended_badly(ran, death, again=len(history) > 1):
            tally.fault(case.name, problem[0], moment, problem[1])
        for kind, seen in check_left(case, folder, before, straight):
            tally.fault(case.name, kind, moment, seen)
    _finish(case, straight, ", then ".join(history), folder, tally, lane)


def _ended_badly(ran: Ran, death: Death, again: bool) -> tuple[str, str] | None:
    again = again and ran.status == 2  # it had been done, and says that it is there
    if ran.hung:
        return "hang", f"still there after {ran.wall:.0f} s"
    if ran.left:
        return "left running", f"{ran.left} processes"
    if ran.traceback:
        return "traceback", ran.last
    if ran.status and ran.status not in _EXPECTED[death.number] and not again:
        return "status", f"exit {ran.status}: {ran.last}"
    return None


def _finish(case: Case, straight: Undisturbed, moment: str, folder: Path, tally: Tally, lane: Lane) -> None:
    """The same command; for a chain that is in the queue, what its message names."""
    [ran] = lane.zygote.run(case.run(lane.world, folder))
    if case.slurm and ran.status == 2 and "resume" in ran.err:
        [ran] = lane.zygote.run(case.run(lane.world, folder, argv=("resume", "chain")))
    problems = list(check_finished(case, folder, straight, lane))
    if ran.status == 2 and not ran.traceback and all(map(lock_left, problems)):
        # it had been done, and says that it is there; the dead one's lock is the next writer's to take over
        return tally.add(case.name, "done before it died")
    if ran.status or ran.left:
        kind = (
            "hang"
            if ran.hung
            else "traceback"
            if ran.traceback
            else "left running"
            if ran.left
            else "does not finish"
        )
        return tally.fault(case.name, kind, moment, f"exit {ran.status}: {ran.last} {problems[:2]}")
    for kind, seen in problems:
        tally.fault(case.name, kind, moment, seen)
