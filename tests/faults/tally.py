"""Counts of trials, and what went wrong in them: what a study returns, and what the page is rendered from."""

from __future__ import annotations

import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worlds import World
from zygote import Zygote


@dataclass(frozen=True)
class Fault:
    """A broken promise: in which row, which one, at what moment or by what change, and what was seen."""

    row: str
    kind: str
    moment: str
    seen: str

    def __str__(self) -> str:
        return f"{self.row}: {self.kind}: {self.moment}: {self.seen}"


class Tally:
    """Trials by row and outcome. Outcomes are words for people; those that break a promise are ``Fault``s."""

    def __init__(self) -> None:
        self.rows: dict[str, Counter[str]] = defaultdict(Counter)
        self.faults: list[Fault] = []
        self._lock = threading.Lock()

    def count(self, row: str, *outcomes: str) -> None:
        with self._lock:
            self.rows[row].update(["trials", *outcomes])

    def add(self, row: str, outcome: str) -> None:
        """A further outcome of a trial that was counted."""
        with self._lock:
            self.rows[row][outcome] += 1

    def most(self, row: str, what: str, value: int) -> None:
        """Keep the largest of a measurement."""
        with self._lock:
            self.rows[row][what] = max(self.rows[row][what], value)

    def fault(self, row: str, kind: str, moment: object, seen: str) -> None:
        found = Fault(row, kind, str(moment), seen)
        with self._lock:
            self.faults.append(found)
        print("BROKEN", found, file=sys.stderr, flush=True)

    @property
    def trials(self) -> int:
        return sum(row["trials"] for row in self.rows.values())

    def broken(self, *kinds: str) -> int:
        return sum(fault.kind in kinds for fault in self.faults) if kinds else len(self.faults)

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": {name: dict(sorted(row.items())) for name, row in sorted(self.rows.items())},
            "faults": [vars(fault) for fault in self.faults],
        }


@dataclass(frozen=True)
class Lane:
    """What one worker has to itself: a zygote, and a folder for the trial at hand."""

    zygote: Zygote
    world: World
    folder: Path


class Lanes:
    """Workers that take trials side by side."""

    def __init__(self, world: World, zygotes: Iterable[Zygote], root: Path) -> None:
        # names of one length: paths in files do not change their sizes
        self._lanes = [Lane(zygote, world, root / f"lane{i}") for i, zygote in enumerate(zygotes)]

    def __call__(self, trials: Iterable[Callable[[Lane], None]]) -> None:
        queue, lock = iter(trials), threading.Lock()

        def work(lane: Lane) -> None:
            while True:
                with lock:
                    trial = next(queue, None)
                if trial is None:
                    return
                trial(lane)

        with ThreadPoolExecutor(len(self._lanes)) as pool, ExitStack() as stack:
            for done in [pool.submit(work, lane) for lane in self._lanes]:
                stack.callback(done.result)

    @property
    def first(self) -> Lane:
        return self._lanes[0]
