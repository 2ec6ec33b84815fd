"""Which jobs of a chain are in the queue: those whose ids it recorded, and those that bear its names.

An id may be missing in the record: the answer of sbatch was lost, or whoever submitted was killed before it could be
written down. The name of a job holds a digest of the run folder, so that no other chain's job has it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from ..errors import UserError
from ..files import lock
from ..files.reading import read_text
from . import scheduler
from .answers import JobId, Queued
from .record import JobRecord, Record
from .script import clusters, job_dir, queue_name, script_path


def queue_of(found: Record | None) -> list[Queued]:
    """All of the user's jobs on the clusters that a chain's jobs are on. Raises ``UserError`` where squeue fails."""
    jobs = found.jobs.items() if found is not None else ()
    named = (
        c for name, job in jobs for c in ([job.cluster] if job.cluster else clusters(found.run_dir, name))
    )
    return scheduler.mine({*named} or {""})


def live(found: Record, queue: Iterable[Queued]) -> dict[str, list[Queued]]:
    """Job of the chain -> what of it waits or runs, oldest first."""
    once = {q.id: q for q in queue}
    return {
        name: [once[id] for id in sorted(once) if _is(once[id], found, name, job)]
        for name, job in found.jobs.items()
    }


def _is(queued: Queued, found: Record, name: str, job: JobRecord) -> bool:
    own = queue_name(found.run_dir, name)
    if queued.name and queued.name == own:
        return True
    # a Slurm that was set up anew counts from 1 again: an id alone may be that of another chain's job
    named_otherwise = own and queued.name and queued.command
    return queued.id in job.ids and not (
        named_otherwise and not _same(Path(queued.command), found.run_dir, name)
    )


def _same(command: Path, run_dir: Path, name: str) -> bool:
    return os.path.realpath(command) == os.path.realpath(script_path(run_dir, name))


def adopted(found: Record, queue: Sequence[Queued]) -> Record:
    """The record with the ids that it lacks."""
    jobs = {}
    for name, queued in live(found, queue).items():
        job = found.jobs[name]
        missing = [q for q in queued if q.id not in job.ids]
        cluster = missing[-1].cluster if missing else job.cluster
        jobs[name] = replace(job, ids=job.ids + tuple(q.id for q in missing), cluster=cluster)
    return replace(found, jobs=jobs)


def refuse_shared(
    run_dir: Path, work: Mapping[str, Path], queue: Iterable[Queued], own: Iterable[JobId]
) -> None:
    """Raises ``UserError`` where a job of a chain would write to a folder that another chain's job writes to.

    Known are the user's own jobs in the queue, by their scripts, and whoever runs and has locked the folder.

    Args:
        run_dir: of the chain.
        work: job -> the run folder of its recipe.
        own: the chain's jobs that may be in the queue.
    """
    folders = {os.path.realpath(folder): name for name, folder in work.items()}
    ids = {str(job.number) for job in own}
    for queued in queue:
        script = Path(queued.command)
        job = script.parent
        if script.name != "job.sbatch" or os.path.realpath(job) == os.path.realpath(
            job_dir(run_dir, job.name)
        ):
            continue
        folder = works_in(job)
        name = folders.get(os.path.realpath(folder)) if folder is not None else None
        if name is not None:
            raise UserError(
                f"{folder}, the run_dir of {name}, belongs to job {queued.id} in the queue ({queued.name}, "
                f"{queued.command}); wait for it, cancel it, or choose another run_dir"
            )
    for folder, name in folders.items():
        owner = lock.living_owner(lock.within(Path(folder)))
        if owner is not None and owner.job not in ids:
            raise UserError(
                f"{folder}, the run_dir of {name}, is in use by {owner}; wait for it, stop it, or choose another"
            )


def works_in(job: Path) -> Path | None:
    """The run folder of the recipe that ``submit`` wrote into a job's folder; ``None`` where that cannot be read."""
    try:
        line = re.search(r"^run_dir: .*$", read_text(job / "recipe.yaml"), re.MULTILINE)
        return Path(yaml.safe_load(line[0])["run_dir"]) if line else None
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError):
        return None
