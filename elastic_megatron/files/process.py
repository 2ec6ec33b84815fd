"""Which process is this, and does that one still run? Numbers of processes mean something on one machine only."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path


@lru_cache(1)
def space() -> str:
    """The kernel's boot and the namespace of process numbers, which containers may have of their own.

    Empty where that is not known: then no process can be told from another by its number.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def mark() -> str:
    """Short name of this process among all that share a file system: of its space, and its number."""
    return f"{hashlib.blake2b(space().encode(), digest_size=4).hexdigest()}-{os.getpid()}"


def ended(name: str) -> bool:
    """Is it known that the process with this ``mark`` has ended? False where it cannot be known from here."""
    where, _, pid = name.partition("-")
    here = space() and where == mark().partition("-")[0]
    return bool(here) and pid.isdecimal() and running(int(pid)) is False


def running(pid: int, started: str | None = None) -> bool | None:
    """Does a process of this space run, the one that ``start_of`` told apart? ``None`` where it cannot be known."""
    if not 0 < pid < 1 << 31:
        return False
    found = start_of(pid)
    if found is not None:
        return found != "" and started in (None, found)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, and /proc does not show those (hidepid)
    return None


def start_of(pid: int) -> str | None:
    """When a process started, in the kernel's ticks: empty for one that has ended; ``None`` where none is seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "" if fields[0] in ("Z", "X") else fields[19]
