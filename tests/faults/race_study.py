"""Two writers of one target: never a wrong result, and the second is told who the first is.

Three ways to meet: both start at once; the second starts while the first is held still in the midst of its writing;
the second is held in turn. Where both end with 0, the target is what the one that ended last would have made alone,
or what both would have; where one is refused, it is what the other makes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fault_cases import CASES, Case
from kill_study import Undisturbed, undisturbed
from moments import Strike
from settled import check_finished
from tally import Lane, Lanes, Tally
from zygote import Ran

REFUSED, RETRY = 2, 75
_TOLD = re.compile(r"process \d+ on |already|holds a checkpoint|queued|was removed|taken over", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """A command and its rival for the same target: the same again, or one that would write something else."""

    first: Case
    second: Case


def _rival(case: Case, **changes: str) -> Case:
    """A command with other arguments, for the same target."""
    return replace(case, argv=tuple(changes.get(argument, argument) for argument in case.argv))


PAIRS = {
    "import": Pair(CASES["import"], CASES["import"]),
    "import of two models": Pair(CASES["import"], _rival(CASES["import"], **{"{w}/hf": "{w}/other_hf"})),
    "export": Pair(CASES["export one"], CASES["export one"]),
    "export of two checkpoints": Pair(CASES["export one"], _rival(CASES["export one"], small="medium")),
    "slice": Pair(CASES["slice checkpoint"], CASES["slice checkpoint"]),
    "slice of two submodels": Pair(CASES["slice checkpoint"], _rival(CASES["slice checkpoint"], small="medium")),
    "export and slice": Pair(CASES["export quantised"], CASES["slice checkpoint"]),
    "prepare-data": Pair(CASES["prepare-data over"], CASES["prepare-data over"]),
    "prepare-data of two texts": Pair(
        CASES["prepare-data over"], _rival(CASES["prepare-data over"], **{"{w}/valid.txt": "{w}/train.txt"})
    ),
    "report": Pair(CASES["report quantised"], CASES["report quantised"]),
    "rank": Pair(CASES["rank"], CASES["rank"]),
    "train": Pair(CASES["train"], CASES["train"]),
    "quantize": Pair(CASES["quantize"], CASES["quantize"]),
    "submit": Pair(CASES["submit"], CASES["submit"]),
}  # fmt: skip
RACES = {
    "import": 4, "import of two models": 8, "export": 4, "export of two checkpoints": 8, "slice": 4,
    "slice of two submodels": 6, "export and slice": 4, "prepare-data": 4, "prepare-data of two texts": 6,
    "report": 4, "rank": 6, "train": 6, "quantize": 5, "submit": 6,
}  # fmt: skip
SAMPLE = {
    "import of two models": 2,
    "export of two checkpoints": 1,
    "prepare-data of two texts": 1,
    "submit": 1,
}


@dataclass(frozen=True)
class Meeting:
    """Which of the two is held still at which call, until the other has ended; neither where ``call`` is 0."""

    held: int
    call: int
    delay: float

    def __str__(self) -> str:
        if not self.call:
            return f"the second {1000 * self.delay:.0f} ms after the first"
        return f"the {('first', 'second')[self.held]} held at call {self.call}"


def study(lanes: Lanes, races: dict[str, int], seed: int, tally: Tally) -> None:
    """So many races of each pair."""
    rng = random.Random(seed)
    alone: dict[tuple[str, ...], Undisturbed] = {}
    trials: list[Callable[[Lane], None]] = []
    for name, count in races.items():
        pair = PAIRS[name]
        for case in (pair.first, pair.second):
            if case.argv not in alone:
                named = replace(case, name=f"{name} {len(alone)}")
                alone[case.argv] = undisturbed(named, lanes.first)
        for i in range(count):
            calls = alone[(pair.first, pair.second)[i % 2].argv].calls
            call = rng.randrange(1, calls + 1) if i % 4 else 0
            meeting = Meeting(i % 2, call, rng.random() * 0.5 * alone[pair.first.argv].wall)
            trials.append(partial(_race, name, pair, alone, meeting, tally))
    lanes(trials)


def _race(
    name: str,
    pair: Pair,
    alone: dict[tuple[str, ...], Undisturbed],
    meeting: Meeting,
    tally: Tally,
    lane: Lane,
) -> None:
    folder = pair.first.prepare(lane.world, lane.folder)
    gate = lane.folder.with_name(f"{lane.folder.name}-gate")
    for file in (gate, Path(f"{gate}.held")):
        file.unlink(missing_ok=True)
    hold = Strike("hold", meeting.call, gate=str(gate)) if meeting.call else None
    runs = [case.run(lane.world, folder) for case in (pair.first, pair.second)]
    if hold is None:
        runs[1] = replace(runs[1], delay=meeting.delay)
    else:
        # the one that is held starts first; the other when it is, and opens the gate by ending
        runs[meeting.held] = replace(runs[meeting.held], strike=hold)
        runs[1 - meeting.held] = replace(runs[1 - meeting.held], gate=f"{gate}.held", opens=str(gate))
    ran = lane.zygote.run(*runs)
    tally.count(
        name, "held" if meeting.call else "at once", " and ".join(sorted(f"exit {r.status}" for r in ran))
    )
    for fault in _wrong(pair, ran, folder, alone, lane):
        tally.fault(name, fault[0], meeting, fault[1])


def _wrong(
    pair: Pair, ran: list[Ran], folder: Path, alone: dict[tuple[str, ...], Undisturbed], lane: Lane
) -> list[tuple[str, str]]:
    problems = []
    for one in ran:
        if one.traceback or one.hung or one.left:
            problems.append(
                ("traceback" if one.traceback else "hang" if one.hung else "left running", one.last)
            )
        elif one.status not in (0, REFUSED, RETRY):
            problems.append(("status", f"exit {one.status}: {one.last}"))
        elif one.status and not _TOLD.search(one.err):
            problems.append(("first not named", one.last))
    done = [case for case, r in zip((pair.first, pair.second), ran, strict=True) if r.status == 0]
    if not done:
        return [*problems, ("lost", f"neither finished: {ran[0].last} | {ran[1].last}")]
    # of two that did, what lies there must be what one of them makes, whole
    found = [list(check_finished(case, folder, alone[case.argv], lane)) for case in done]
    if all(found):
        problems.append(("wrong result", f"{'; '.join(': '.join(p) for p in found[0][:3])}"))
    elif len(done) == 2 and pair.first.argv != pair.second.argv and not pair.first.copies:
        problems.append(("wrong result", "both ended with 0 and wrote different things to one target"))
    return problems
