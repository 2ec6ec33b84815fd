"""Calling the quickstart in a process of its own, and interrupting it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

TIMEOUT = 240.0


@dataclass(frozen=True)
class Ended:
    """A finished call: exit status, what it printed, and which of its processes were left running."""

    status: int
    out: str
    err: str
    left: list[int]


@dataclass(frozen=True)
class Quickstart:
    """Inputs and folder of a quickstart, and its calls so far, by name."""

    root: Path
    calls: dict[str, Ended] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.root / "out"

    def call(
        self, *options: str, until: Callable[[], bool] | None = None, number: int = 0, all_ranks: bool = False
    ) -> Ended:
        """Run it to its end, or send it a signal as soon as ``until`` holds: to it alone or to ``all_ranks`` too."""
        command = [
            sys.executable, "-m", "elastic_megatron.cli", "quickstart", "--out", str(self.out),
            "--recipes", str(self.root / "recipes"), "--text", str(self.root / "train.txt"),
            "--heldout", str(self.root / "valid.txt"), *options,
        ]  # fmt: skip
        with (self.root / "stdout").open("w") as out, (self.root / "stderr").open("w") as err:
            child = subprocess.Popen(
                command, stdout=out, stderr=err, start_new_session=True, env=self._environment()
            )
            deadline = time.monotonic() + TIMEOUT
            try:
                while until is not None and not until():
                    assert child.poll() is None and time.monotonic() < deadline, (
                        self.root / "stderr"
                    ).read_text()
                    time.sleep(0.05)
                if until is not None:
                    (os.killpg if all_ranks else os.kill)(child.pid, number)
                child.wait(deadline - time.monotonic())
                left = self._session(child.pid)
            finally:
                for pid in self._session(child.pid):
                    os.kill(pid, signal.SIGKILL)
                child.wait()
        return Ended(
            child.returncode, (self.root / "stdout").read_text(), (self.root / "stderr").read_text(), left
        )

    def _environment(self) -> dict[str, str]:
        """One thread a process. Where bytecode is not kept, keep it here: these are a dozen imports of torch."""
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if environment.pop("PYTHONDONTWRITEBYTECODE", None):
            environment["PYTHONPYCACHEPREFIX"] = str(self.root.parent / "bytecode")
        return environment

    @staticmethod
    def _session(leader: int) -> list[int]:
        def of_session(pid: int) -> bool:
            try:
                return os.getsid(pid) == leader and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
            except (ProcessLookupError, psutil.NoSuchProcess):
                return False

        return [pid for pid in psutil.pids() if of_session(pid)]
