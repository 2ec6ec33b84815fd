"""Metrics of a run: one JSON object a line, TensorBoard, and progress for a person."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files.writing import write_text


class RunLog:
    """Writes ``metrics.jsonl`` and TensorBoard events; shows a bar on a terminal and plain lines elsewhere.

    Only the main rank constructs one with ``active``; the others' calls do nothing. Lines of steps after
    ``resumed_at`` are removed on opening, so that a resumed run's file reads like an uninterrupted one.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        title: str,
        total: int,
        resumed_at: int,
        interval: int,
        tensorboard: bool,
        active: bool,
    ) -> None:
        self.active = active
        if not active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        _truncate(self.path, resumed_at)
        self.file = self.path.open("a", buffering=1)
        self.interval = interval
        self.title = title
        self.total = total
        self.started = time.monotonic()
        self.first = resumed_at
        self.tensorboard = run_dir / "tensorboard" if tensorboard else None
        self.writer: Any = None
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task(title, total=total, completed=resumed_at, note="")
            self.bar.start()

    def step(self, line: Mapping[str, Any]) -> None:
        """One optimiser step: appended always, shown at the log interval."""
        if not self.active:
            return
        self._write(line)
        step = line["step"]
        note = f"loss {line['loss']:.4f}  lr {line['lr']:.1e}"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=note)
        elif step % self.interval == 0 or step == self.total:
            done = step - self.first
            left = (time.monotonic() - self.started) / max(done, 1) * (self.total - step)
            print(f"{self.title}: step {step}/{self.total}  {note}  about {left:.0f} s left", file=sys.stderr)
        if self._scalars():
            for key in ("loss", "kd_loss", "router_loss", "lr", "grad_norm", "step_ms"):
                if line.get(key) is not None:
                    self.writer.add_scalar(f"train/{key}", line[key], step)

    def event(self, kind: str, value: Mapping[str, Any]) -> None:
        """A ``{"eval": ...}`` or ``{"router": ...}`` line."""
        if not self.active:
            return
        self._write({kind: value})
        if kind == "eval" and self._scalars():
            for name, result in value["submodels"].items():
                self.writer.add_scalar(f"eval/{name}", result["loss"], value["step"])

    def say(self, text: Any) -> None:
        """A line or rich renderable for the person watching."""
        if self.active:
            self.console.print(text)

    def _scalars(self) -> bool:
        """Is TensorBoard wanted? Opened when there is something to write: a finished run gets no empty file."""
        if self.tensorboard is not None and self.writer is None:
            self.writer = _tensorboard(self.tensorboard)
        return self.writer is not None

    def _write(self, line: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        if not self.active:
            return
        if self.bar is not None:
            self.bar.stop()
        if self.writer is not None:
            self.writer.close()
        self.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _truncate(path: Path, resumed_at: int) -> None:
    """Drop lines of steps after the checkpoint that the run resumes from, and a line cut short by a crash."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        step = line.get("step", next((v.get("step", 0) for v in line.values() if isinstance(v, dict)), 0))
        if step <= resumed_at:
            kept.append(text)
    write_text(path, "".join(f"{text}\n" for text in kept))


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
