"""Submit a chain, cancel it, continue it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..recipe import JobChain
from . import record, scheduler
from .record import JobRecord, Record
from .script import files_of, job_dir, links, log_dir, script_path

# those that decide a run's numbers; a container has its own
PACKAGES = (
    "elastic-megatron", "torch", "megatron-core", "transformers", "transformer-engine", "mamba-ssm",
    "causal-conv1d", "nvidia-modelopt",
)  # fmt: skip


def submit(chain: JobChain, command: Sequence[str] = (), again: bool = False) -> dict[str, tuple[int, ...]]:
    """Write the chain's files and queue its jobs, each after those that it needs; job -> ids in the queue.

    Args:
        command: what the user typed, for the record.
        again: over a chain that was submitted before; its files are written anew, and jobs that succeeded stay.

    Raises ``UserError`` where the folder holds a chain that was submitted before, and it is not ``again`` or still in
    the queue; and where Slurm refuses a job: those queued before it are then cancelled.
    """
    before = record.read(chain.run_dir)
    if before is not None:
        _check_again(before, again)
    write(chain)
    known = before.jobs if before is not None else {}
    jobs = {
        job.name: JobRecord(known[job.name].ids if job.name in known else (), job.after, links(job))
        for job in chain.jobs
    }
    todo = {name: job for name, job in jobs.items() if not record.done(chain.run_dir, name)}
    for name in todo:
        (job_dir(chain.run_dir, name) / "failures").unlink(missing_ok=True)
    queued = _queue_all(chain.run_dir, todo)
    Record(chain.run_dir, chain.name, {**jobs, **queued}, _facts(chain, command)).save()
    return _new(jobs, queued)


def _check_again(before: Record, again: bool) -> None:
    live = scheduler.queue(i for job in before.jobs.values() for i in job.ids)
    if live:
        raise UserError(
            f"{before.run_dir} holds a chain whose job {min(live)} is queued; cancel it, or choose another run_dir"
        )
    if not again:
        raise UserError(
            f"{before.run_dir} holds a chain that was submitted before; `resume` continues it with the scripts as they "
            "stand, `submit --again` writes them anew; or choose another run_dir"
        )


def write(chain: JobChain) -> None:
    """The chain's files, without submitting them."""
    for path, text in files_of(chain).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for job in chain.jobs:
        logs = log_dir(chain.run_dir, job.name)
        if (elsewhere := chain.cluster.log_dir) is None:
            logs.mkdir(exist_ok=True)
        elif not logs.is_symlink() and not logs.exists():
            folder = elsewhere / chain.name / job.name
            folder.mkdir(parents=True, exist_ok=True)
            logs.symlink_to(folder)


def cancel(found: Record, names: Collection[str] = ()) -> list[int]:
    """Cancel jobs (all of the chain without ``names``); the ids that were in the queue."""
    chosen = [job for name, job in found.jobs.items() if not names or name in names]
    ids = sorted(scheduler.queue(i for job in chosen for i in job.ids))
    scheduler.cancel(ids)
    return ids


def resume(found: Record, names: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Queue again what neither succeeded nor is in the queue; name -> new ids.

    The scripts are sent as they stand in the folder. A job waits for those that it needs, where they are in the
    queue. Failures are forgotten: somebody looked at them. Raises ``UserError`` where a job that is needed neither
    succeeded nor is among those that run.
    """
    live = scheduler.queue(i for job in found.jobs.values() for i in job.ids)
    todo: dict[str, JobRecord] = {}
    for name, job in found.jobs.items():
        queued = [i for i in job.ids if i in live]
        if record.done(found.run_dir, name) or (names and name not in names):
            continue
        if queued and not (set(job.after) & set(todo)):
            continue
        scheduler.cancel(queued)  # it waits for a job that is gone
        todo[name] = job
    waiting = {n: job.last for n, job in found.jobs.items() if job.last in live and n not in todo}
    for name, job in todo.items():
        for needed in job.after:
            if needed not in todo and needed not in waiting and not record.done(found.run_dir, needed):
                raise UserError(f"{name} needs {needed}, which has not succeeded; resume {needed} too")
        (job_dir(found.run_dir, name) / "failures").unlink(missing_ok=True)
    new = _queue_all(found.run_dir, todo, waiting)
    replace(found, jobs={**found.jobs, **new}).save()
    return _new(found.jobs, new)


def _new(before: Mapping[str, JobRecord], after: Mapping[str, JobRecord]) -> dict[str, tuple[int, ...]]:
    """Ids that were added."""
    return {name: job.ids[len(before[name].ids) :] for name, job in after.items()}


def dependency(after: Sequence[int | str], link_count: int) -> str:
    """sbatch's ``--dependency``: success of other jobs, and the end of the link before."""
    parts = [f"afterok:{':'.join(map(str, after))}"] if after else []
    return ",".join(parts + ["singleton"] * (link_count > 1))


def _queue_all(
    run_dir: Path, todo: Mapping[str, JobRecord], waiting: Mapping[str, int] | None = None
) -> dict[str, JobRecord]:
    """Submit jobs in order; ``waiting``: the last id of other jobs that are in the queue already."""
    last, out, sent = dict(waiting or {}), dict[str, JobRecord](), list[int]()
    try:
        for name, job in todo.items():
            after = [last[needed] for needed in job.after if needed in last]
            first = len(sent)
            for _ in range(job.links):
                sent.append(scheduler.sbatch(script_path(run_dir, name), dependency(after, job.links)))
            last[name] = sent[-1]
            out[name] = replace(job, ids=job.ids + tuple(sent[first:]))
    except UserError:
        scheduler.cancel(sent)
        raise
    return out


def _facts(chain: JobChain, command: Sequence[str]) -> dict[str, Any]:
    return {
        "submitted": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "source": str(chain.source.absolute()),
        "cluster": str(chain.cluster_file or ""),
        "commits": {
            "recipe": commit(chain.source.absolute().parent),
            "package": commit(Path(__file__).parent),
        },
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
    }


def commit(folder: Path) -> str | None:
    """The git commit of a folder, ``+dirty`` where tracked files differ from it; ``None`` outside git."""
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> str | None:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30
        )
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "HEAD")
    return head and head + ("+dirty" if git("status", "--porcelain", "--untracked-files=no") else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
