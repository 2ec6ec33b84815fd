"""What a chain's folder knows of its jobs: ``chain.json``, and the attempts that the jobs note themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import json_files
from ..recipe import is_chain, load_jobs
from ..recipe.load import load
from .answers import JobId
from .script import job_dir

FILE = "chain.json"
_MOST_LINKS = 10_000


@dataclass(frozen=True)
class JobRecord:
    """A job of the chain: ids in the order they were submitted, what it waits for, how often it is queued at once.

    ``cluster``: where a site has several, the one that took it.
    """

    ids: tuple[int, ...]
    after: tuple[str, ...]
    links: int
    cluster: str = ""

    @property
    def last(self) -> int:
        """The newest id, 0 before there is one."""
        return self.ids[-1] if self.ids else 0

    def job_ids(self, ids: Collection[int]) -> list[JobId]:
        """Ids of this job, as Slurm's programs want them."""
        return [JobId(id, self.cluster) for id in ids]


@dataclass(frozen=True)
class Record:
    """``chain.json``: written before the first job is submitted, and extended with every id as it arrives.

    ``unfinished``: the command that submits has not come to its end; it was killed, or is at work.
    """

    run_dir: Path
    name: str
    jobs: Mapping[str, JobRecord]
    facts: Mapping[str, Any] = field(default_factory=dict)
    unfinished: bool = False

    def all_ids(self) -> list[JobId]:
        """Of all jobs, whatever became of them."""
        return [id for job in self.jobs.values() for id in job.job_ids(job.ids)]

    def save(self) -> None:
        """Raises ``OSError`` where the disk refuses."""
        jobs = {name: asdict(job) for name, job in self.jobs.items()}
        state = {"unfinished": True} if self.unfinished else {}
        json_files.write_object(self.run_dir / FILE, {"name": self.name, **state, "jobs": jobs, **self.facts})


def read(run_dir: Path) -> Record | None:
    """The record of a folder, ``None`` where no chain was submitted. Raises ``UserError`` for a damaged one."""
    path = run_dir / FILE
    if not path.exists():
        return None
    remedy = "cancel by the job ids that squeue shows, remove it and submit again"
    data = json_files.read_object(path, "submit the chain first", remedy)
    try:
        jobs = {name: _job(name, job) for name, job in data.pop("jobs").items()}
        unfinished = bool(data.pop("unfinished", False))
        json_files.strict(data)  # it is written again
        return Record(run_dir, str(data.pop("name")), jobs, data, unfinished)
    except (ValueError, OverflowError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged; {remedy}") from None


def _job(name: str, said: Mapping[str, Any]) -> JobRecord:
    """A job of the record. Raises ``ValueError``, ``TypeError`` or ``KeyError`` where it cannot be one."""
    job = JobRecord(
        tuple(map(int, said["ids"])), tuple(said["after"]), int(said["links"]), str(said.get("cluster", ""))
    )
    names = [name, *job.after]  # of folders
    if not all(isinstance(n, str) and n not in ("", "..") and Path(n).name == n for n in names):
        raise ValueError(f"{names}: no names of jobs")
    if not 0 < job.links <= _MOST_LINKS:
        raise ValueError(f"{job.links} links")
    return job


def find(target: Path) -> Record:
    """The record meant by a run folder, a chain file or a recipe. Raises ``UserError`` where there is none."""
    run_dir = (
        target
        if target.is_dir()
        else (load_jobs(target).run_dir if is_chain(target) else load(target).run_dir)
    )
    if (record := read(run_dir)) is None:
        raise UserError(
            f"{run_dir} holds no submitted chain (no {FILE}); submit it first, or name its run folder"
        )
    return record


@dataclass(frozen=True)
class Attempt:
    """One start of a job, as its script noted it. ``exit`` is ``None`` while it runs, or where it was cut off.

    ``why``: the script's words where it was not the ranks that ended it.
    """

    number: int
    id: int
    started: int
    exit: int | None
    ended: int | None
    progress: str
    why: str = ""


def attempts(run_dir: Path, name: str) -> list[Attempt]:
    """All attempts of a job, oldest first; lines cut short by a crash are passed over."""
    path = job_dir(run_dir, name) / "attempts"
    found: dict[int, Attempt] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        words = line.split()
        if len(words) < 5 or not all(word.isdecimal() for word in words[:3]):
            continue
        number, id, time = map(int, words[:3])
        progress = words[5] if len(words) > 5 else ""
        if words[3] == "start":
            found[number] = Attempt(number, id, time, None, None, progress)
        elif words[3] == "exit" and words[4].isdecimal() and number in found:
            begun = found[number]
            why = " ".join(words[6:])
            found[number] = Attempt(number, id, begun.started, int(words[4]), time, progress, why)
    return [found[number] for number in sorted(found)]


def done(run_dir: Path, name: str) -> bool:
    """Did the job succeed?"""
    return (job_dir(run_dir, name) / "done").exists()


def failures(run_dir: Path, name: str) -> int:
    """Failures in a row without a newer checkpoint."""
    path = job_dir(run_dir, name) / "failures"
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text.isdecimal() else 0
