"""One writer per folder: a lock file that says who holds it, on local disks and on NFS.

The file appears whole and at once, by a hard link, and is stamped every few seconds while its owner lives. Whether
the owner of a lock that is found still lives is known for certain on the same machine (process and start time) and
for an earlier start of the same Slurm job, which Slurm ended before it queued the job again; otherwise an owner is
taken for dead once its stamp is old by the file server's own clock. A dead owner's lock is taken over, and that is
said.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from ..errors import UserError
from .json_files import parse
from .reading import read_text
from .writing import private_name

FILE = ".lock"
BEAT, STALE = 15.0, 120.0
_POLL = 0.2


@dataclass(frozen=True)
class Owner:
    """Who holds a lock; ``space`` is the machine's boot and the process namespace in which ``pid`` means something."""

    command: str
    host: str
    pid: int
    started: str
    space: str
    job: str
    restarts: str
    since: str
    token: str

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"{self.command} (process {self.pid} on {self.host}{job}, since {self.since})"


class Held:
    """A lock that this process holds."""

    def __init__(self, file: Path, owner: Owner) -> None:
        self.file, self.owner = file, owner
        self._over = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name=f"lock {file}").start()

    def check(self) -> None:
        """Raises ``UserError`` where the lock is gone, or somebody else's: the folder is not ours to write to."""
        found = owner_of(self.file)
        if found is None:
            raise UserError(
                f"{self.file} was removed while {self.owner.command} was running, and perhaps the folder with it; "
                "nothing more is written there"
            )
        if found.token != self.owner.token:
            raise UserError(
                f"{self.file} was taken over by {found}; this process was taken for dead and writes nothing more"
            )

    def release(self) -> None:
        """Give the lock back, if it is still ours. A forked child's call does nothing."""
        self._over.set()
        if os.getpid() == self.owner.pid:
            with contextlib.suppress(UserError, OSError):
                self.check()
                self.file.unlink()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self.file)


@contextlib.contextmanager
def locked(file: Path, command: str) -> Iterator[Held]:
    """Hold a lock during a block.

    Args:
        file: of the lock: ``within(folder)`` or ``beside(target)``; its folder is made where it is missing.
        command: what the owner does, for whoever finds the lock.

    Raises ``UserError`` that names the owner where somebody else holds it.
    """
    held = acquire(file, command)
    try:
        yield held
    finally:
        held.release()


def within(folder: Path) -> Path:
    """The lock of a folder that stays: a run folder, a cache."""
    return folder / FILE


def beside(target: Path) -> Path:
    """The lock of a path that appears by renaming: a converted directory, a data set's prefix."""
    return target.parent / f".{target.name}{FILE}"


def acquire(file: Path, command: str) -> Held:
    """Take a lock, to be released. As ``locked``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    me = _myself(command)
    deadline = time.monotonic() + (STALE + BEAT if me.job else 0.0)
    while not _create(file, me):
        found = owner_of(file)
        if found is None:
            continue  # released meanwhile
        if not _alive(found, me, file):
            if _taken_over(file, found, me):
                print(f"{file}: taken over from {found}, which is no longer running", file=sys.stderr)
                break
        elif time.monotonic() >= deadline or found.space == me.space:
            raise UserError(f"{file} is held by {found}; wait for it, or stop it, and try again")
        else:  # a job that follows one on a machine that died has to wait until its stamp is old
            time.sleep(_POLL)
    return Held(file, me)


def owner_of(file: Path) -> Owner | None:
    """Who holds a lock; ``None`` where nobody does. Of a damaged file, an owner without a process."""
    try:
        said = parse(read_text(file, 1 << 16))
        known = {
            name: said[name] for name, value in asdict(_NOBODY).items() if type(said[name]) is type(value)
        }
        return Owner(**known)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError):
        return _NOBODY


def living_owner(file: Path) -> Owner | None:
    """Who holds a lock and, as far as can be known from here, still lives."""
    found = owner_of(file)
    return found if found is not None and _alive(found, _myself(""), file) else None


_NOBODY = Owner("an unknown command", "an unknown host", 0, "", "", "", "", "an unknown time", "")


def _myself(command: str) -> Owner:
    pid = os.getpid()
    return Owner(
        command=command,
        host=socket.gethostname(),
        pid=pid,
        started=_process_start(pid) or "",
        space=_space(),
        job=os.environ.get("SLURM_JOB_ID", ""),
        restarts=os.environ.get("SLURM_RESTART_COUNT", "0"),
        since=datetime.now().astimezone().isoformat(timespec="seconds"),
        token=secrets.token_hex(8),
    )


def _space() -> str:
    """The kernel's run and the namespace of process numbers, which containers may have of their own."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """When a process started, in the kernel's ticks; ``None`` where it does not run (any more)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _alive(owner: Owner, me: Owner, file: Path) -> bool:
    if owner.space and owner.space == me.space:
        return _process_start(owner.pid) == owner.started
    if owner.job and owner.job == me.job and owner.restarts != me.restarts:
        return False
    probe = private_name(file)
    try:
        stamp = file.stat().st_mtime
        probe.touch()
        return probe.stat().st_mtime - stamp < STALE
    except OSError:
        return True
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _create(file: Path, me: Owner) -> bool:
    """Make the lock file, whole; false where there is one."""
    private = _written(file, me)
    try:
        os.link(private, file)
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: the name comes before the content
        return _create_exclusively(file, me)
    finally:
        private.unlink(missing_ok=True)


def _create_exclusively(file: Path, me: Owner) -> bool:
    try:
        with open(file, "x") as f:
            json.dump(asdict(me), f)
        return True
    except FileExistsError:
        return False


def _written(file: Path, me: Owner) -> Path:
    private = private_name(file)
    private.write_text(json.dumps(asdict(me)) + "\n")
    return private


def _taken_over(file: Path, dead: Owner, me: Owner) -> bool:
    """Put our lock in a dead owner's place; false where somebody was faster.

    Those who try at once are put in a row by the kernel's lock on the old file, and look again when it is their turn.
    """
    try:
        with open(file) as old:
            with contextlib.suppress(OSError):  # file systems without such locks
                fcntl.flock(old, fcntl.LOCK_EX)
            same = os.path.samestat(os.fstat(old.fileno()), file.stat())
            if not same or owner_of(file) != dead:
                return False
            os.replace(_written(file, me), file)
            return True
    except FileNotFoundError:
        return False
