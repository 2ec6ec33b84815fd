"""Who holds a lock, and whether he still lives, as far as that can be known from here."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from . import process
from .json_files import parse
from .reading import read_text
from .writing import private_name

STALE = 120.0
"""Seconds without a sign of life after which an owner elsewhere is taken for dead."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock; ``space`` is the machine's boot and the process namespace in which ``pid`` means something."""

    command: str
    host: str
    pid: int
    started: str
    space: str
    job: str
    cluster: str
    restarts: str
    since: str
    token: str

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"{self.command} (process {self.pid} on {self.host}{job}, since {self.since})"


NOBODY = Owner("an unknown command", "an unknown host", 0, "", "", "", "", "", "an unknown time", "")


def read(file: Path) -> Owner:
    """The owner that a lock names; ``NOBODY`` of a damaged one. Raises ``OSError`` as ``open`` does."""
    try:
        said = parse(read_text(file, 1 << 16))
        known = {
            name: said[name] for name, value in asdict(NOBODY).items() if type(said[name]) is type(value)
        }
        owner = Owner(**known)
    except (ValueError, TypeError, LookupError):
        return NOBODY
    texts = [value for value in asdict(owner).values() if isinstance(value, str)]
    return owner if all(text.isprintable() and len(text) < 256 for text in texts) else NOBODY


def myself(command: str) -> Owner:
    """This process as an owner; every call is another one."""
    pid = os.getpid()
    return Owner(
        command=command,
        host=socket.gethostname(),
        pid=pid,
        started=process.start_of(pid) or "",
        space=process.space(),
        job=os.environ.get("SLURM_JOB_ID", ""),
        cluster=os.environ.get("SLURM_CLUSTER_NAME", ""),
        restarts=os.environ.get("SLURM_RESTART_COUNT", "0"),
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
        token=secrets.token_hex(8),
    )


def alive(owner: Owner, me: Owner, file: Path) -> bool:
    """May an owner still live? Certain on this machine and for an earlier start of this job, else told by the stamp."""
    if owner.space and owner.space == me.space:
        if (known := process.running(owner.pid, owner.started)) is not None:
            return known
    elif owner.job and (owner.job, owner.cluster) == (me.job, me.cluster) and owner.restarts != me.restarts:
        return False
    return _now(file) - stamp_of(file) < STALE


def stamp_of(file: Path) -> float:
    """The last sign of life; long ago where there is none."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _now(file: Path) -> float:
    """By the clock of the file server, or where that cannot be asked, by ours."""
    probe = private_name(file)
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
