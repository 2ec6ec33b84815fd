"""Exact moments of a running command: its n-th call to the file system, where a fault can strike.

Python reports every opening, renaming and removing to audit hooks before it happens; writing and syncing through
``os`` is wrapped. What lies below a folder is counted and, at the n-th call, a signal is delivered, the error of a
broken disk raised, or the process held still while another one runs. Counters lie in memory that the starter shares,
so that they are known after a kill too.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CHANGING = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
_THROUGH_OS = ("fsync", "pwrite", "pwritev", "write", "writev", "posix_fallocate", "ftruncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_ROOM = 512


@dataclass(frozen=True)
class Strike:
    """What happens at the ``call``-th change below the run's folder.

    Args:
        kind: ``signal`` (``number`` of it), ``error`` (``number`` is the errno), ``hold`` (until ``gate`` exists),
            ``truncate`` (the file ``gate``, to half) or ``none``: calls are counted only.
        reads: opening for reading counts too.
        lasting: later calls fail as well: a disk that is full stays full.
        below: the folder; the run's own by default.
    """

    kind: str
    call: int = 0
    number: int = 0
    gate: str = ""
    reads: bool = False
    lasting: bool = False
    below: str = ""

    def __str__(self) -> str:
        what = {
            "signal": lambda: signal.Signals(self.number).name,
            "error": lambda: errno.errorcode[self.number],
        }.get(self.kind, lambda: self.kind)()
        return f"{what} at call {self.call}"


class Counter:
    """How many calls a run and its children made, and where the strike fell; shared over forks."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _ROOM)

    def next(self) -> int:
        count = int.from_bytes(self._memory[:8], "little") + 1
        self._memory[:8] = count.to_bytes(8, "little")
        return count

    @property
    def count(self) -> int:
        return int.from_bytes(self._memory[:8], "little")

    def note(self, text: str) -> None:
        data = text.encode(errors="replace")[: _ROOM - 8]
        self._memory[8 : 8 + len(data)] = data

    @property
    def noted(self) -> str:
        return self._memory[8:].rstrip(b"\0").decode(errors="replace")


def watch(strike: Strike, folder: Path, counter: Counter) -> None:
    """Install the hook in this process, for good."""
    root = os.path.realpath(strike.below or folder) + os.sep

    def called(event: str, path: str | None) -> None:
        if path is None or not path.startswith(root):
            return
        count = counter.next()
        if count == strike.call or (strike.lasting and 0 < strike.call <= count):
            counter.note(f"{event} {path.removeprefix(root)}")
            _strike(strike, path)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        # of two paths, the second appears: the one to look at
        if event in _CHANGING or (event == "open" and (strike.reads or (args[2] or 0) & _WRITING)):
            called(event, _subject(args[:1] if event == "open" else args[::-1]))

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(descriptor: int, *args: Any) -> Any:
            called(name, os.readlink(f"/proc/self/fd/{descriptor}"))
            return call(descriptor, *args)

        return counted

    for name in _THROUGH_OS:
        setattr(os, name, wrapped(name, getattr(os, name)))
    sys.addaudithook(hook)


def _subject(args: tuple[Any, ...]) -> str | None:
    """The path that a call is about, the first that is one."""
    for path in args:
        with contextlib.suppress(TypeError, ValueError):
            # the folder's links are followed, the file's own are not: it may not be there yet
            text = os.path.abspath(os.fsdecode(path))
            return os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
    return None


def _strike(strike: Strike, path: str) -> None:
    if strike.kind == "signal":
        if strike.number == signal.SIGKILL:
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpgrp(), strike.number)  # the command itself, also from a process that it forked
    elif strike.kind == "error":
        raise OSError(strike.number, os.strerror(strike.number), path)
    elif strike.kind == "truncate":
        os.truncate(strike.gate, os.path.getsize(strike.gate) // 2)
    elif strike.kind == "hold":
        Path(f"{strike.gate}.held").touch()
        while not os.path.exists(strike.gate):
            time.sleep(0.01)
