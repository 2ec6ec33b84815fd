"""Ranks on which the parallel tests run: processes that stay up, with a new rendezvous for every job.

    with RankPool(4) as ranks:
        losses = ranks.run(train, 2, seed=1)  # train(seed=1) on two ranks; what each of them returns

A job is a function that another interpreter can import by its name, and arguments and results that ``pickle`` takes.
It finds torchrun's environment and calls ``runtime.start`` itself; its process groups are destroyed after it. A job
that fails on any rank ends them all, and the next one finds new ranks. Ranks may also die on purpose:

        job = ranks.start(save_for_ever, 2)
        time.sleep(0.3)
        job.kill()  # kill -9 for all, or job.kill(1) for one
        outcomes = job.wait()
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jobs import Crew, Job, Outcome

WORKER = Path(__file__).with_name("worker.py")
IMPORT_SECONDS = 180.0
JOBS = 4  # that ranks do before fresh ones take over: gloo's threads outlive the groups that a job destroys


class RankError(Exception):
    """A job failed: on which rank, how, and the traceback and output of each that failed, first to last."""

    def __init__(self, message: str, outcomes: Sequence[Outcome] = ()) -> None:
        super().__init__(message)
        self.outcomes = tuple(outcomes)


class RankPool:
    """``size`` single-threaded ranks. Nothing is started before the first job.

    Args:
        cuda: whether the ranks see GPUs (one each); without, they run as on a machine that has none.
    """

    def __init__(self, size: int = 4, *, cuda: bool = False) -> None:
        self.size = size
        # CUDA does not survive a fork: ranks that use it import for themselves
        self._import_first = not cuda
        self._variables = {"OMP_NUM_THREADS": "1"} | ({} if cuda else {"CUDA_VISIBLE_DEVICES": ""})
        self._importer: _Importer | None = None
        self._crew: Crew | None = None
        self._served = 0
        self._job: Job | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, function: Callable[..., Any], world: int, /, *args: Any, timeout: float = 120.0, **kwargs: Any
    ) -> list[Any]:
        """What ``function(*args, **kwargs)`` returns on each of ``world`` ranks, by rank.

        Raises ``RankError`` if on any of them it raises, dies, or is not done after ``timeout`` seconds.
        """
        outcomes = self.start(function, world, *args, **kwargs).wait(timeout)
        if failed := [outcome for outcome in outcomes if outcome.how != "returned"]:
            name = f"{function.__module__}.{function.__qualname__} on {world} ranks"
            details = [f"--- {outcome}\n{outcome.detail}" for outcome in failed]
            raise RankError("\n".join([f"{name}: {failed[0]}", *details]), outcomes)
        return [outcome.value for outcome in sorted(outcomes, key=lambda outcome: outcome.rank)]

    def start(self, function: Callable[..., Any], world: int, /, *args: Any, **kwargs: Any) -> Job:
        """Start a job and return at once. One that was started before and not waited for is killed."""
        if not 1 <= world <= self.size:
            raise ValueError(f"a job on {world} ranks, but the pool has {self.size}")
        call = pickle.dumps((function, args, kwargs))
        if (self._job is not None and not self._job.done) or self._served == JOBS:
            self._end_crew()
        if self._crew is None:
            self._crew, self._served = self._new_crew(), 0
        self._served += 1
        self._job = Job(self._crew, world, call, self._variables, self._end_crew)
        return self._job

    def close(self) -> None:
        """End all processes of the pool. A later job starts new ones."""
        self._end_crew()
        if self._importer is not None:
            self._importer.close()
            self._importer = None

    @property
    def pids(self) -> list[int]:
        """Process numbers of the importer and of the ranks."""
        importer = [self._importer.pid] if self._importer else []
        return [*importer, *(self._crew.pids if self._crew else ())]

    def _new_crew(self) -> Crew:
        if self._importer is not None and not self._importer.alive:
            self._importer.close()
            self._importer = None
        if self._importer is None:
            self._importer = _Importer(self._import_first, self._variables)
        pairs = [socket.socketpair() for _ in range(self.size)]
        with contextlib.ExitStack() as theirs:
            pids = self._importer.ask(b"fork", [theirs.enter_context(there).fileno() for _, there in pairs])
        return Crew(pids, [Connection(here.detach()) for here, _ in pairs], self._importer.logs)

    def _end_crew(self) -> list[int]:
        """Kill the ranks; their exit statuses."""
        crew, self._crew = self._crew, None
        if crew is None or self._importer is None:
            return []
        crew.kill(range(self.size))
        crew.close()
        return self._importer.ask(b"reap")


class _Importer:
    """The process of :mod:`worker`, and the folder in which it and the ranks leave what they print."""

    def __init__(self, import_first: bool, variables: dict[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self.logs = Path(self._folder.name)
        # messages keep their borders, and the end of either process shows
        self._control, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(IMPORT_SECONDS)
        with there, (self.logs / "importer.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-u", str(WORKER), str(there.fileno()), str(self.logs), str(import_first)],
                env=os.environ | variables,
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes, pipes: Sequence[int] = ()) -> list[int]:
        """One number for each rank. Raises ``RankError`` if there is no answer."""
        try:
            socket.send_fds(self._control, [request], pipes)
            answer = self._control.recv(4096)
        except OSError:
            answer = b""
        if not answer:
            printed = (self.logs / "importer.log").read_text(errors="replace")
            self.close()
            raise RankError(f"the process that imports Megatron for the ranks has ended\n{printed}")
        return json.loads(answer)

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()
