"""One writer per folder: a lock file that says who holds it, on local disks and on NFS.

The file appears whole and at once, by a hard link, and is stamped every few seconds while its owner lives. Whether
the owner of a lock that is found still lives is known for certain on the same machine (process and start time) and
for an earlier start of the same Slurm job, which Slurm ended before it queued the job again; otherwise an owner is
taken for dead once its stamp is old by the file server's own clock. A dead owner's lock is taken over, and that is
said. Nothing that only reads needs a lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from ..errors import UserError
from .owner import NOBODY, STALE, Owner, alive, myself, read, stamp_of
from .writing import private_name, remove_abandoned

FILE = ".lock"
BEAT = 15.0
_POLL, _SETTLE = 0.2, 1.0
# of a file that is gone, or on its way
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


class Held:
    """A lock that this process holds; ``lost`` once it was missed, which is looked for every few seconds."""

    def __init__(self, file: Path, owner: Owner, made: Sequence[Path] = ()) -> None:
        self.file, self.owner, self._made = file, owner, made
        self.lost = False
        self._over = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name=f"lock {file}").start()

    def check(self) -> None:
        """Raises ``UserError`` where the lock is gone, or somebody else's: the folder is not ours to write to.

        A file server that does not answer now is no reason to stop.
        """
        try:
            found = read(self.file)
        except OSError as e:
            if e.errno not in _GONE:
                return
            raise UserError(
                f"{self.file} was removed while {self.owner.command} was running, and perhaps the folder with it; "
                "nothing more is written there"
            ) from None
        if found.token != self.owner.token:
            raise UserError(
                f"{self.file} was taken over by {found}; this process was taken for dead and writes nothing more"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception) and type(error) is not UserError:
                self.check()  # a folder that is gone explains what went wrong
        finally:
            self.release()

    def release(self) -> None:
        """Give the lock back, if it is still ours, and folders that were made for it and are empty.

        A forked child's call does nothing.
        """
        self._over.set()
        if os.getpid() != self.owner.pid:
            return
        with contextlib.suppress(UserError, OSError):
            self.check()
            self.file.unlink()
            for folder in self._made:
                folder.rmdir()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self.check()  # or another's lock would look alive
                os.utime(self.file)
            except UserError:
                self.lost = True
            except OSError:
                pass


@contextlib.contextmanager
def locked(file: Path, command: str, patience: float = 0.0) -> Iterator[Held]:
    """Hold a lock during a block.

    Args:
        file: of the lock: ``within(folder)`` or ``beside(target)``; its folder is made where it is missing.
        command: what the owner does, for whoever finds the lock.
        patience: seconds to wait for somebody who holds it.

    Raises ``UserError`` that names the owner where somebody else holds it, or, in place of whatever went wrong in the
    block, where the lock is gone; and ``OSError`` that names the folder where it cannot be written to.
    """
    with acquire(file, command, patience) as held:
        yield held


def within(folder: Path) -> Path:
    """The lock of a folder that stays: a run folder, a cache."""
    return folder / FILE


def beside(target: Path) -> Path:
    """The lock of a path that appears by renaming: a converted directory, a data set's prefix.

    Whatever the path is called, by links or from elsewhere, it has the same lock.
    """
    path = Path(os.path.realpath(target))
    return path.parent / f".{path.name}{FILE}"


def acquire(file: Path, command: str, patience: float = 0.0) -> Held:
    """Take a lock, to be released. As ``locked``."""
    me, made = myself(command), list[Path]()
    try:
        while (found := _waited_for(file, me, patience)) is not None or not _create(file, me, made):
            if found is not None and _taken_over(file, found, me):
                print(f"{file}: taken over from {found}, which is no longer running", file=sys.stderr)
                break
        remove_abandoned(file.parent, file.name)
    except BaseException as e:
        with contextlib.suppress(OSError):
            if owner_of(file) == me:  # made a moment before a signal
                file.unlink()
            for folder in made:
                folder.rmdir()
        if isinstance(e, OSError):
            raise OSError(e.errno, e.strerror, str(file.parent)) from e
        raise
    return Held(file, me, made)


def owner_of(file: Path) -> Owner | None:
    """Who holds a lock; ``None`` where nobody does. Of a damaged file, an owner without a process."""
    try:
        return read(file)
    except OSError as e:
        return None if e.errno in _GONE else NOBODY


def living_owner(file: Path) -> Owner | None:
    """Who holds a lock and, as far as can be known from here, still lives."""
    found = owner_of(file)
    return found if found is not None and alive(found, myself(""), file) else None


def _waited_for(file: Path, me: Owner, patience: float) -> Owner | None:
    """The owner that is dead, or ``None`` where there is none, after having waited for one that may live.

    A job that follows one on a machine that died has to wait until its stamp is old; a stamp that moves is a living
    owner's. Raises ``UserError`` where the wait is over.
    """
    began, said, first = time.monotonic(), False, dict[str, float]()
    while (found := owner_of(file)) is not None and alive(found, me, file):
        stamp = stamp_of(file)
        here = found.space != "" and found.space == me.space
        certain = here or stamp > first.setdefault(found.token, stamp)
        doubt = STALE + BEAT if me.job and not certain else 0.0
        if time.monotonic() - began >= max(patience, doubt):
            remedy = "" if here else f"; if it died, that is known {STALE:.0f} s after its last sign of life"
            raise UserError(f"{file} is held by {found}; wait for it, or stop it, and try again{remedy}")
        if not said:
            print(f"{file} is held by {found}; waiting for it", file=sys.stderr)
            said = True
        time.sleep(_POLL)
    if found is None and file.is_symlink():
        raise UserError(f"{file} is a link, which no lock is; remove it")
    return found


def _create(file: Path, me: Owner, made: list[Path]) -> bool:
    """Make the lock file, whole, and ``made`` folders for it; false where somebody was faster."""
    made += [p for p in (file.parent, *file.parent.parents) if not p.exists() and p not in made]
    file.parent.mkdir(parents=True, exist_ok=True)
    private = private_name(file)
    try:
        private.write_text(_text(me))
        os.link(private, file)
        return True
    except (FileExistsError, FileNotFoundError):  # the latter where its owner removed the folder too
        return _linked(private)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        # a lost answer of NFS, or a file system without hard links, where the name comes before the content
        return _linked(private) or _create_exclusively(file, me)
    finally:
        private.unlink(missing_ok=True)


def _linked(private: Path) -> bool:
    try:
        return private.stat().st_nlink > 1
    except OSError:
        return False


def _create_exclusively(file: Path, me: Owner) -> bool:
    try:
        with open(file, "x") as f:
            f.write(_text(me))
        return True
    except FileExistsError:
        return False


def _text(me: Owner) -> str:
    return json.dumps(asdict(me)) + "\n"


def _taken_over(file: Path, dead: Owner, me: Owner) -> bool:
    """Put our lock in a dead owner's place; false where somebody was faster.

    Those who try at once are put in a row by the kernel's lock on the old file, and look again when it is their turn.
    Where there are no such locks, the last of those who try within a second has it.
    """
    private = private_name(file)
    try:
        with _opened(file) as old:
            row = True
            try:
                fcntl.flock(old, fcntl.LOCK_EX)
            except OSError:
                row = False
            same = os.path.samestat(os.fstat(old.fileno()), file.stat())
            if not same or owner_of(file) != dead:
                return False
            private.write_text(_text(me))
            os.replace(private, file)
        if not row:
            time.sleep(_SETTLE)
        return owner_of(file) == me
    except FileNotFoundError:
        return False
    finally:
        private.unlink(missing_ok=True)


def _opened(file: Path) -> BinaryIO:
    """To be locked: NFS locks only what may be written to; a FIFO would hang whoever only reads it."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError:  # somebody else's, in a folder of a group
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    return os.fdopen(descriptor, "rb")
