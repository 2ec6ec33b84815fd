"""What the kernel says of processes: groups that a command left running, and how much memory this one has."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

_GRACE = 5.0  # seconds in which what a command started may end after it


def kill_group(leader: int) -> int:
    """Kill what a command left running; how many there were, once those that were dying have gone."""
    deadline = time.monotonic() + _GRACE
    while left := _members(leader):
        if time.monotonic() >= deadline:
            os.killpg(leader, signal.SIGKILL)
            break
        time.sleep(0.02)
    return left


def _members(group: int) -> int:
    found = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                state, its = _stat(entry)
                found += its == group and state not in "ZX"
    return found


def _stat(process: Path) -> tuple[str, int]:
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[2])


def data_size() -> int:
    """Bytes of this process's private memory, as RLIMIT_DATA counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
