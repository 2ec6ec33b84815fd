"""One job on the ranks of a :mod:`pool`: handed out, watched, and its outcome on every rank."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

from torch.distributed import TCPStore

from elastic_megatron.runtime.launch import torchrun_environment

GRACE_SECONDS = 2.0  # for the other ranks to end on their own, once one has failed
STOP_SECONDS = 30.0  # for all ranks to destroy their process groups
LOG_LINES = 40

How = Literal["returned", "raised", "died", "hung", "stopped"]


@dataclass(frozen=True)
class Outcome:
    """How a job ended on one rank.

    Args:
        how: ``stopped`` is a rank that was killed because another one had failed.
        value: what the function returned.
        error: one line: the exception, or what ended the process.
        detail: traceback and the end of what the rank printed, unless it returned.
    """

    rank: int
    how: How
    value: Any = None
    error: str = ""
    detail: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} {self.how}" + (f": {self.error}" if self.error else "")


class Crew:
    """The processes that a pool's ranks are now, and how to talk to them."""

    def __init__(self, pids: Sequence[int], pipes: Sequence[connection.Connection], logs: Path) -> None:
        self.pids, self.pipes, self.logs = pids, pipes, logs
        # a pipe may be held open by what a rank has forked, so its end does not tell that the rank has died
        self.lives = [os.pidfd_open(pid) for pid in pids]

    def send(self, rank: int, message: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # a dead rank: heard of when its answer is awaited
            self.pipes[rank].send_bytes(message)

    def listen(self, ranks: Collection[int], seconds: float) -> list[int]:
        """Those that have answered or died; empty after ``seconds``."""
        sources = {self.pipes[rank]: rank for rank in ranks} | {self.lives[rank]: rank for rank in ranks}
        ready = connection.wait(sources, max(0.0, seconds))
        return list({sources[source] for source in ready})

    def receive(self, rank: int) -> bytes | None:
        """A rank's answer; ``None`` if it died without one."""
        try:
            return self.pipes[rank].recv_bytes() if self.pipes[rank].poll() else None
        except (EOFError, OSError):
            return None

    def abort(self, ranks: Collection[int]) -> None:
        """End ranks in a way that has them print where they are."""
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGABRT)
        until, dying = time.monotonic() + GRACE_SECONDS, {self.lives[rank] for rank in ranks}
        while dying and (dead := connection.wait(dying, max(0.0, until - time.monotonic()))):
            dying -= {*dead}

    def kill(self, ranks: Collection[int]) -> None:
        """SIGKILL for ranks and everything that they have started."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pids[rank], signal.SIGKILL)

    def close(self) -> None:
        for pipe, life in zip(self.pipes, self.lives, strict=True):
            pipe.close()
            os.close(life)

    def printed(self, rank: int) -> str:
        """The last lines that a rank wrote to stdout and stderr during its job."""
        text = (self.logs / f"rank{rank}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-LOG_LINES:])


class Job:
    """A function under way on ranks 0 to ``world`` - 1 of a crew.

    Args:
        call: pickle of (function, arguments, keyword arguments).
        variables: environment of the ranks, beside this process' own and torchrun's.
        end_crew: kills the crew and returns the exit status of each of its ranks.
    """

    def __init__(
        self,
        crew: Crew,
        world: int,
        call: bytes,
        variables: dict[str, str],
        end_crew: Callable[[], list[int]],
    ) -> None:
        self.world, self.done = world, False
        self._crew, self._end_crew = crew, end_crew
        self._answers: dict[int, tuple[How, Any, str, str]] = {}
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(world):
            environment = os.environ | variables | torchrun_environment(rank, world, self._store.port)
            crew.send(rank, pickle.dumps((environment, sys.path, os.getcwd(), call)))

    def kill(self, *ranks: int) -> None:
        """SIGKILL for these ranks (all, if none is named), and for all that they have started."""
        if not self.done:
            self._crew.kill(ranks or range(self.world))

    def wait(self, timeout: float = 120.0) -> list[Outcome]:
        """How the job ended on every rank: deaths, then the others as they ended. Raises for none of it.

        Ranks that are not done after ``timeout`` seconds, or soon after another one has failed, are killed.
        """
        try:
            self._listen(timeout)
            if not self._failed():
                for rank in range(self.world):
                    self._crew.send(rank, b"")
                self._listen(STOP_SECONDS)
        except BaseException:
            self._end_crew()
            raise
        finally:
            self.done = True
        return self._conclude() if self._failed() else self._outcomes()

    def _failed(self) -> bool:
        return any(how != "returned" for how, *_ in self._answers.values())

    def _listen(self, timeout: float) -> None:
        """Hear every rank once."""
        until, silent = time.monotonic() + timeout, set(range(self.world))
        while silent and (heard := self._crew.listen(silent, until - time.monotonic())):
            for rank in heard:
                silent.remove(rank)
                message = self._crew.receive(rank)
                if message is None:
                    self._answers[rank] = ("died", None, "", "")
                elif message:
                    value, error = pickle.loads(message)
                    self._answers[rank] = ("raised", None, *error) if error else ("returned", value, "", "")
            if self._failed():
                until = min(until, time.monotonic() + GRACE_SECONDS)
        how: How = "stopped" if self._failed() else "hung"
        self._answers |= {rank: (how, None, f"after {timeout:g} s", "") for rank in silent}

    def _conclude(self) -> list[Outcome]:
        """End the crew; what is known of every rank then."""
        crew = self._crew
        crew.abort([rank for rank, (how, *_) in self._answers.items() if how in ("hung", "stopped")])
        codes = self._end_crew()
        for rank, (how, value, error, trace) in self._answers.items():
            if how == "died":
                error = _status(codes[rank])
            elif how == "stopped":
                error = "since another rank had failed"
            detail = "" if how == "returned" else f"{trace}{crew.printed(rank)}"
            self._answers[rank] = (how, value, error, detail)
        return self._outcomes()

    def _outcomes(self) -> list[Outcome]:
        outcomes = [Outcome(rank, *answer) for rank, answer in self._answers.items()]
        # errors that a death caused on other ranks may be heard of before it
        return sorted(outcomes, key=lambda outcome: outcome.how != "died")


def _status(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
