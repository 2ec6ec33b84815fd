"""Finish the step, save, leave: what a scheduler's or a person's signal asks of a training process."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


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
        self.received = self.received or signal.Signals(number)

    def __enter__(self) -> StopSignal:
        self._before = {s: signal.signal(s, self._handle) for s in self.HANDLED}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)
