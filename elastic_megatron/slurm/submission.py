"""Submit a chain, cancel it, continue it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..files import lock, writing
from ..recipe import JobChain
from . import record, scheduler
from .answers import JobId, Queued
from .facts import collect
from .live import adopted, live, queue_of, refuse_shared, works_in
from .record import JobRecord, Record
from .script import files_of, job_dir, job_name, links, log_dir
from .sending import Sending


def submit(chain: JobChain, command: Sequence[str] = (), again: bool = False) -> dict[str, tuple[int, ...]]:
    """Write the chain's files and queue its jobs, each after those that it needs; job -> ids in the queue.

    Where an earlier call was killed half-way, this one goes on: what is in the queue stays there.

    Args:
        command: what the user typed, for the record.
        again: over a chain that was submitted before; its files are written anew, and jobs that succeeded stay.

    Raises ``UserError`` where the folder holds a chain that was submitted before, and it is not ``again`` or still in
    the queue; where another chain's job uses a folder of this one; and where Slurm refuses a job: those queued before
    it are then cancelled.
    """
    with lock.locked(_lock(chain.run_dir), "elastic-megatron submit"):
        before, queue = check(chain, again)
        known = before.jobs if before is not None else {}
        facts = collect(chain, command)
        for folder in (chain.run_dir, *(job_dir(chain.run_dir, job.name) for job in chain.jobs)):
            writing.remove_abandoned(folder)  # by a submit that was killed
        write(chain)
        jobs = {
            job.name: replace(known.get(job.name, _NEW), after=job.after, links=links(job))
            for job in chain.jobs
        }
        start = Record(chain.run_dir, chain.name, jobs, facts, unfinished=True)
        cut_off = before is not None and before.unfinished
        end = _continued(start, queue, topped_up=cut_off, restore=before)
        queued = live(start, queue)  # nothing, but for what a call that was cut off left
    return {name: (*(q.id for q in queued[name]), *ids) for name, ids in _added(start, end).items()}


_NEW = JobRecord((), (), 1)


def check(chain: JobChain, again: bool) -> tuple[Record | None, list[Queued]]:
    """What the run folder knows, and the user's queue. Raises ``UserError`` where ``submit`` must not go on."""
    before = record.read(chain.run_dir)
    queue = queue_of(before)
    if before is not None:
        before = adopted(before, queue)
        _check_again(before, again, queue, chain)
    else:
        names = {job_name(chain, job) for job in chain.jobs}
        if ids := " ".join(str(id) for id in sorted(q.id for q in queue if q.name in names)):
            raise UserError(
                f"{chain.run_dir} has no record of jobs in the queue that bear the names of this chain's: {ids}; "
                f"`scancel {ids}`, and submit again"
            )
    work = {job.name: job.recipe.run_dir for job in chain.jobs}
    refuse_shared(chain.run_dir, work, queue, before.all_ids() if before is not None else [])
    return before, queue


def _check_again(before: Record, again: bool, queue: Sequence[Queued], chain: JobChain) -> None:
    ids = [q.id for jobs in live(before, queue).values() for q in jobs]
    if before.unfinished:
        changed = next((path for path, text in files_of(chain).items() if _differs(path, text)), None)
        if ids and changed is not None:
            raise UserError(
                f"{before.run_dir}: an earlier submit was cut off, its job {min(ids)} is in the queue, and {changed} "
                "would now be another; `elastic-megatron cancel` it first"
            )
        return
    if ids:
        raise UserError(
            f"{before.run_dir} holds a chain whose job {min(ids)} is queued; cancel it, or choose another run_dir"
        )
    if not again:
        raise UserError(
            f"{before.run_dir} holds a chain that was submitted before; `resume` continues it with the scripts as they "
            "stand, `submit --again` writes them anew; or choose another run_dir"
        )


def _differs(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(errors="replace") != text


def write(chain: JobChain) -> None:
    """The chain's files, without submitting them."""
    for path, text in files_of(chain).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        writing.write_text(path, text)
    for job in chain.jobs:
        logs = log_dir(chain.run_dir, job.name)
        if (elsewhere := chain.cluster.log_dir) is None:
            logs.mkdir(exist_ok=True)
        elif not logs.is_symlink() and not logs.exists():
            folder = elsewhere / chain.name / job.name
            folder.mkdir(parents=True, exist_ok=True)
            logs.symlink_to(folder)


def cancel(found: Record, names: Collection[str] = ()) -> list[int]:
    """Cancel jobs (all of the chain without ``names``); the ids that were in the queue.

    Where squeue does not answer, everything that has not succeeded is cancelled.
    """
    chosen = [name for name in found.jobs if not names or name in names]
    try:
        waiting = live(found, queue_of(found))
        ids = {name: [q.id for q in waiting[name]] for name in chosen}
    except UserError:
        ids = {n: [] if record.done(found.run_dir, n) else list(found.jobs[n].ids) for n in chosen}
        if not any(ids.values()):
            raise
    scheduler.cancel(id for name in chosen for id in found.jobs[name].job_ids(ids[name]))
    return sorted(id for name in chosen for id in ids[name])


def resume(found: Record, names: Collection[str] = ()) -> dict[str, tuple[int, ...]]:
    """Queue again what neither succeeded nor is in the queue; name -> new ids.

    The scripts are sent as they stand in the folder. A job waits for those that it needs, where they are in the
    queue. Failures are forgotten: somebody looked at them. Raises ``UserError`` where a job that is needed neither
    succeeded nor is among those that run.
    """
    with lock.locked(_lock(found.run_dir), "elastic-megatron resume"):
        found = record.read(found.run_dir) or found
        queue = queue_of(found)
        found = adopted(found, queue)
        todo = [
            name
            for name, jobs in live(found, queue).items()
            if not jobs and not record.done(found.run_dir, name)
        ]
        work = {n: folder for n in todo if (folder := works_in(job_dir(found.run_dir, n))) is not None}
        refuse_shared(found.run_dir, work, queue, found.all_ids())
        end = _continued(found, queue, names, topped_up=found.unfinished, restore=found)
    return {name: ids for name, ids in _added(found, end).items() if ids}


def _lock(run_dir: Path) -> Path:
    """Of the record: the folder itself may be locked by a job that runs in it."""
    return lock.beside(run_dir / record.FILE)


def _added(before: Record, after: Record) -> dict[str, tuple[int, ...]]:
    return {name: job.ids[len(before.jobs[name].ids) :] for name, job in after.jobs.items()}


def _continued(
    found: Record,
    queue: Sequence[Queued],
    names: Collection[str] = (),
    *,
    topped_up: bool,
    restore: Record | None,
) -> Record:
    """The record once all is queued that should be.

    Args:
        names: only these jobs; all without any.
        topped_up: also the missing links of jobs of which some are queued.
        restore: what the folder knows where Slurm refuses a job.
    """
    waiting = live(found, queue)
    counts: dict[str, int] = {}
    stale: list[JobId] = []
    for name, job in found.jobs.items():
        if record.done(found.run_dir, name) or (names and name not in names):
            continue
        queued = waiting[name]
        if set(job.after) & set(counts):  # it waits for a job that is gone
            stale += job.job_ids([q.id for q in queued])
            queued = []
        if not queued or (topped_up and len(queued) < job.links):
            counts[name] = job.links - len(queued)
    last = {name: jobs[-1].id for name, jobs in waiting.items() if jobs and name not in counts}
    for name in counts:
        for needed in found.jobs[name].after:
            if needed not in counts and needed not in last and not record.done(found.run_dir, needed):
                raise UserError(f"{name} needs {needed}, which has not succeeded; resume {needed} too")
    scheduler.cancel(stale)
    for name in counts:
        (job_dir(found.run_dir, name) / "failures").unlink(missing_ok=True)
    return Sending(found, {q.id for q in queue}, restore).all(counts, last, bool(names))
