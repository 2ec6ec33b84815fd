"""How the jobs of a chain stand: the queue first, then what the jobs noted, then what Slurm still remembers."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import AGAIN, BAD_INPUT, DIVERGED, UserError
from ..files.json_files import parse_line
from ..recipe import Recipe, load
from . import record, scheduler
from .answers import JobId, Queued
from .live import live, queue_of
from .record import Attempt, JobRecord, Record
from .script import job_dir, log_dir

_ENDS = {
    "TIMEOUT": "out of time before it had saved; raise slurm.time or slurm.continuation.lead",
    "OUT_OF_MEMORY": "out of the node's memory",
    "NODE_FAIL": "a node failed",
    "BOOT_FAIL": "a node did not start",
    "DEADLINE": "past its deadline",
    "PREEMPTED": "preempted",
}
_FINALS = {BAD_INPUT: f"bad input (exit {BAD_INPUT})", DIVERGED: f"diverged (exit {DIVERGED}); see its log"}
_STANDS = {"PENDING": "waiting", "RUNNING": "running", "COMPLETING": "stopping"}
# of jobs that Slurm ended with TERM, and whose ranks saved
_STOPS = {
    "TIMEOUT": "out of time, and saved; `resume` continues it",
    "PREEMPTED": "preempted, and saved; `resume` continues it",
}


@dataclass(frozen=True)
class JobState:
    """One job as ``status`` shows it.

    ``state`` is one of done, running, waiting, stopping, failed, cancelled, unfinished, lost, unknown. ``step`` of
    ``steps`` and ``loss`` come from the metrics of a training job, and are ``None`` elsewhere.
    """

    name: str
    state: str
    detail: str
    id: int
    attempt: int
    step: int | None
    steps: int | None
    loss: float | None
    log: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def states(found: Record) -> list[JobState]:
    """Every job of a chain, in order. Where Slurm does not answer, what hangs on its answer is ``unknown``."""
    silent, queue = "", list[Queued]()
    try:
        queue = queue_of(found) if scheduler.available() else []
    except UserError as error:
        silent = str(error)
    waiting = live(found, queue)
    return [_state(found, name, job, waiting[name], silent) for name, job in found.jobs.items()]


def _state(found: Record, name: str, job: JobRecord, queued: list[Queued], silent: str) -> JobState:
    tries = record.attempts(found.run_dir, name)
    if record.done(found.run_dir, name):
        state, detail = "done", ""
    elif queued:
        state, detail = _in_queue(found, job, queued, tries)
    else:
        try:
            state, detail = _unknown(silent, tries) if silent else _ended(found, name, job, tries)
        except UserError as error:
            state, detail = "unknown", str(error)
    id = queued[0].id if queued else tries[-1].id if tries else job.last
    log = log_dir(found.run_dir, name) / "latest"
    step, steps, loss = _progress(job_dir(found.run_dir, name) / "recipe.yaml")
    shown = str(log) if log.exists() else None
    return JobState(name, state, detail, id, len(tries), step, steps, loss, shown)


def _unknown(silent: str, tries: list[Attempt]) -> tuple[str, str]:
    """What is certain although Slurm does not answer."""
    last = tries[-1].exit if tries else None
    if last in _FINALS:
        return "failed", _FINALS[last]
    return "unknown", silent + (f"; its last attempt ended with exit {last}" if last is not None else "")


def _in_queue(found: Record, job: JobRecord, queued: list[Queued], tries: list[Attempt]) -> tuple[str, str]:
    running = [
        q for q in queued if q.state in ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED")
    ]
    if running:
        first = running[0]
        return "stopping" if first.state == "COMPLETING" else "running", f"{first.elapsed} on {first.nodes}"
    first = queued[0]
    if first.reason == "Dependency":
        needed = [n for n in job.after if not record.done(found.run_dir, n)]
        return "waiting", f"for {', '.join(needed)}" if needed else "for the link before"
    again = (
        f"again, after exit {tries[-1].exit}; " if tries and tries[-1].exit else "again; " if tries else ""
    )
    start = f", start expected {first.start}" if first.start not in ("N/A", "") else ""
    return "waiting", f"{again}{first.reason}{start}"


def _ended(found: Record, name: str, job: JobRecord, tries: list[Attempt]) -> tuple[str, str]:
    """Not in the queue and not done. What the job noted comes first: Slurm forgets."""
    last = tries[-1] if tries else None
    if last is None and not job.ids:
        return "lost", "its submission was cut off; the same `submit` goes on"
    if last is not None and last.exit == 0:
        return "done", ""  # its note of success found no room
    if last is not None and last.exit is not None:
        count = record.failures(found.run_dir, name)
        if last.exit in (128 + 15, 128 + 2):
            why = _STOPS.get(_last_word(last.id, job))
            return ("unfinished", why) if why else ("cancelled", "saved; `resume` continues it")
        if last.exit == AGAIN:
            why = (
                "saved before its time was over"
                if not count
                else "exit 75 without a newer checkpoint, see its log"
            )
            return "unfinished", f"{why}; `resume` continues it"
        if last.why:
            return "failed", f"exit {last.exit}: {last.why}"
        times = f" for the {count}th time without a newer checkpoint" if count > 3 else ""
        times = {2: " twice in a row", 3: " three times in a row"}.get(count, times)
        return "failed", _FINALS.get(last.exit, f"exit {last.exit}{times}")
    word = _last_word(last.id if last else job.last, job)
    if word in _STANDS:  # a squeue that does not show all
        return _STANDS[word], "by scontrol's word"
    if word == "COMPLETED":
        return "done", "by Slurm's word; it left no note"
    if word == "CANCELLED" and last is None and job.after:
        needed = [n for n in job.after if not record.done(found.run_dir, n)]
        return "cancelled", f"since {', '.join(needed)} did not succeed" if needed else ""
    if word == "CANCELLED":
        return "cancelled", ""
    if word in _ENDS:
        return "failed", _ENDS[word]
    return (
        ("failed", word.lower())
        if word
        else ("lost", "no longer in the queue, and left no note; see its log")
    )


def _last_word(id: int, job: JobRecord) -> str:
    """How Slurm says that a job ended, empty where there is no Slurm or it has forgotten."""
    return scheduler.last_state(JobId(id, job.cluster)) if scheduler.available() else ""


def _progress(recipe_file: Path) -> tuple[int | None, int | None, float | None]:
    """(step, steps in all, loss) of a training job; nothing of a recipe that somebody broke meanwhile."""
    try:
        recipe: Recipe = load(recipe_file)
    except UserError:
        return None, None, None
    if recipe.job != "train":
        return None, None, None
    line = _last_step(recipe.run_dir / "metrics.jsonl")
    step = min(int(line.get("step", 0)), recipe.last_step)
    return step, recipe.last_step, line.get("loss") if step == line.get("step") else None


def _last_step(metrics: Path) -> dict[str, Any]:
    """The newest step line of a metrics file, read from its end: the file may be long."""
    if not metrics.exists():
        return {}
    with metrics.open("rb") as f:
        f.seek(max(0, os.fstat(f.fileno()).st_size - 65536))
        for text in reversed(f.read().splitlines()):
            line = parse_line(text)  # cut off, at either end
            if line is not None and isinstance(line.get("step"), int):
                return line
    return {}
