"""Everything about a chain that can be known to fail before it waits in a queue. Nothing is written, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..errors import UserError
from ..recipe import JobChain, PlannedJob
from .budgets import budget_problems
from .cluster import cluster_problems, time_limit
from .disk import disk_problems
from .family import Families, Found
from .layout import job_problems
from .memory import memory_problems
from .paths import chain_folders, path_problems
from .runs import existing_run, shared_runs
from .work import time_problems


@dataclass(frozen=True)
class Finding:
    """One line about a job: what would go wrong, and what to change to what.

    ``job`` is its name, names with commas between where several have it alike, or empty for the chain as a whole. An
    ``error`` would end the job; a ``warning`` may be meant.
    """

    job: str
    severity: Literal["error", "warning"]
    text: str

    def __str__(self) -> str:
        return f"{self.job}: {self.text}" if self.job else self.text


def preflight(chain: JobChain) -> list[Finding]:
    """What is wrong with a chain, job after job, over each family as it will be by then; errors first.

    Checked are: what each command refuses at its start, the layout against every submodel, memory of the fullest
    rank, files and folders, room on disks, and what the cluster file allows. Settings are named as overrides on the
    command line write them. Empty where nothing was found.
    """
    families = Families(chain)
    names: dict[Found, list[str]] = {found: [] for found in (*chain_folders(chain), *cluster_problems(chain))}
    for job in chain.jobs:
        for found in dict.fromkeys(_of_job(chain, job, families)):
            names.setdefault(found, []).append(job.name)
    names |= {found: [] for found in disk_problems(chain, families)}
    findings = [Finding(", ".join(jobs), *found) for found, jobs in names.items()]
    return sorted(findings, key=lambda finding: finding.severity)


def _of_job(chain: JobChain, job: PlannedJob, families: Families) -> Iterator[Found]:
    yield from time_limit(chain, job)
    yield from path_problems(chain, job)
    yield from shared_runs(chain, job)
    yield from existing_run(chain, job)
    try:
        family = families.of(job)
    except UserError as error:
        if not families.told(job):
            yield "error", str(error)
        return
    problems = list(job_problems(chain, job, family))
    yield from problems
    if not any(severity == "error" for severity, _ in problems):
        yield from memory_problems(chain, job, family)
        yield from budget_problems(job, family)
        yield from time_problems(chain, job, family)
