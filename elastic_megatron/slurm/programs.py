"""Run somebody else's program for a bounded time: it may hang, ask questions, or leave children behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LIMIT = 1 << 20
# colours and titles of terminals
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


@dataclass(frozen=True)
class Answer:
    """What a program said, line by line. ``status`` is ``None`` where it did not end in time."""

    status: int | None
    out: tuple[str, ...] = ()
    err: tuple[str, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """What came on standard error, where programs complain, and then the rest."""
        return self.err + self.out


def run(
    command: Sequence[str], timeout: float, environment: Mapping[str, str] | None = None, text: str = ""
) -> Answer:
    """Start a program with ``text`` as its standard input and wait ``timeout`` seconds for it.

    Raises ``OSError`` where it cannot be started.
    """
    with contextlib.ExitStack() as stack:
        # Not pipes: a child that outlives the program would hold them open. Not files: a full disk would lose a job's
        # id.
        given, out, err = (stack.enter_context(os.fdopen(os.memfd_create(n), "w+b")) for n in ("i", "o", "e"))
        given.write(text.encode("utf-8", "surrogateescape"))
        given.seek(0)
        process = subprocess.Popen(
            command, stdin=given, stdout=out, stderr=err, env=environment, start_new_session=True
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.returncode is None:  # killed, and not waited for: no signal may reach where it hangs
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
        return Answer(status, _lines(out.fileno()), _lines(err.fileno()))


def _lines(descriptor: int) -> tuple[str, ...]:
    return lines(os.pread(descriptor, _LIMIT, 0))


def lines(said: bytes) -> tuple[str, ...]:
    """The lines of an output that say something, without what only a terminal understands."""
    text = _ESCAPES.sub("", said.decode("utf-8", "replace"))
    plain = ("".join(c if c.isprintable() else " " for c in line).strip() for line in text.splitlines())
    return tuple(line for line in plain if line)
