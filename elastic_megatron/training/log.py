"""Metrics of a run: one JSON object a line, TensorBoard, and progress for a person."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files.json_files import finite, parse_line, strict
from ..files.writing import write_text
from .spikes import Spikes


class RunLog:
    """Writes ``metrics.jsonl`` and TensorBoard events; shows a bar on a terminal and plain lines elsewhere.

    Only the main rank constructs one with ``active``; the others' calls do nothing. Lines of steps after
    ``resumed_at`` are removed on opening, so that a resumed run's file reads like an uninterrupted one. Numbers that
    are not finite, which JSON does not have, are written as null. ``spikes`` marks steps whose loss stands out.
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
        spikes: Spikes | None = None,
    ) -> None:
        self.active = active
        if not active:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        self.spikes = spikes
        self._open(resumed_at)
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
        step, spike = line["step"], self.spikes.seen(line) if self.spikes is not None else None
        if spike is not None:
            line = {**line, "spike": round(spike, 2)}
            self.say(
                f"step {step}: loss {line['loss']:.4f} is a spike, {spike:.1f} deviations above the median"
            )
        self._write(line)
        loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
        note = f"loss {loss}  lr {line['lr']:.1e}"
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

    def rewound(self, step: int, facts: Mapping[str, Any]) -> None:
        """The run goes back to the state after ``step``: lines of later ones go, a ``{"rewind": ...}`` line comes."""
        if not self.active:
            return
        self.file.close()
        self._open(step)
        self.event("rewind", {"step": step, **facts})

    def event(self, kind: str, value: Mapping[str, Any]) -> None:
        """A ``{"eval": ...}``, ``{"router": ...}`` or ``{"rewind": ...}`` line."""
        if not self.active:
            return
        self._write({kind: value})
        if kind == "eval" and self._scalars():
            for name, result in value["submodels"].items():
                self.writer.add_scalar(f"eval/{name}", result["loss"], value["step"])

    def lacks(self, kind: str, step: int) -> bool:
        """Was the run killed before the file had this line of the step that it resumes from?"""
        return self.active and (kind, step) not in self.kept

    def say(self, text: Any) -> None:
        """A line or rich renderable for the person watching."""
        if self.active:
            self.console.print(text)

    def _scalars(self) -> bool:
        """Is TensorBoard wanted? Opened when there is something to write: a finished run gets no empty file."""
        if self.tensorboard is not None and self.writer is None:
            self.writer = _tensorboard(self.tensorboard)
        return self.writer is not None

    def _open(self, resumed_at: int) -> None:
        """Continue the file after a step; the lines that stay say which losses are usual."""
        kept = _truncate(self.path, resumed_at)
        self.kept = {(k, e.get("step")) for line in kept for k, e in line.items() if isinstance(e, dict)}
        if self.spikes is not None:
            self.spikes.forget()
            for line in kept:
                self.spikes.seen(line)
        self.file = self.path.open("a", buffering=1)

    def _write(self, line: Mapping[str, Any]) -> None:
        self.file.write(strict(finite(line)) + "\n")

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


def _truncate(path: Path, resumed_at: int) -> list[dict[str, Any]]:
    """Drop lines of steps after the checkpoint that the run resumes from, and a line cut short by a crash.

    Returns the lines that stay.
    """
    texts: list[str] = []
    lines: list[dict[str, Any]] = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        line = parse_line(text) or {}
        step = line.get("step", next((v.get("step") for v in line.values() if isinstance(v, dict)), None))
        if isinstance(step, int) and step <= resumed_at:
            texts.append(text)
            lines.append(line)
    if path.exists():
        write_text(path, "".join(f"{text}\n" for text in texts))
    return lines


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))
