"""Finish the step, save, leave: what a scheduler's or a person's signal asks of a training process. No torch."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..errors import AGAIN


def exit_status(number: signal.Signals) -> int:
    """Of a process that a signal stopped before its work was complete: ``AGAIN``, or 128 + n as of a shell."""
    return AGAIN if number == signal.SIGUSR1 else 128 + number


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """While there is nothing to save: SIGUSR1, which would kill the process, ends it as it does during training."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(exit_status(signal.Signals(number)))

    before = signal.signal(signal.SIGUSR1, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


class StopSignal:
    """Remembers SIGTERM, SIGUSR1 and SIGINT while in context; a second SIGINT interrupts at once.

    ``received`` is the first signal, ``None`` while there is none.
    """

    HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.ask(signal.Signals(number))

    def ask(self, number: signal.Signals) -> None:
        """As if the signal had been received."""
        self.received = self.received or number

    def flags(self) -> list[float]:
        """One for each signal of ``HANDLED``: 1 for the one that was received."""
        return [float(self.received == s) for s in self.HANDLED]

    @classmethod
    def agreed(cls, flags: Sequence[float]) -> signal.Signals | None:
        """The signal for which all ranks leave, from the sum of their ``flags``."""
        return next((s for s, count in zip(cls.HANDLED, flags, strict=True) if count), None)

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._handle) for s in self.HANDLED}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
