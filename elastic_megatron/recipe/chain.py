"""A chain: recipes whose jobs are submitted together, each after those that it needs."""

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, Field

from elastic_megatron.recipe.types import FilePath, Key, Name, Problem, Section, did_you_mean, raise_any


class Job(Section):
    """One recipe of a chain."""

    recipe: FilePath = Field(description="The recipe; its `job` says which command runs it.")
    after: tuple[Key, ...] = Field(
        default=(), description="Jobs of this chain that must have succeeded before."
    )


def _order(jobs: dict[str, Job]) -> dict[str, Job]:
    def problems() -> Iterator[Problem]:
        if not jobs:
            yield Problem((), "needs at least one job")
        earlier: list[str] = []
        for name, job in jobs.items():
            if name in Chain.model_fields:
                yield Problem((name,), f"a job may not be called {name}, which is a key of chains")
            for index, before in enumerate(job.after):
                if before == name:
                    yield Problem((name, "after", index), "a job cannot wait for itself")
                elif before in jobs and before not in earlier:
                    yield Problem((name, "after", index), f"{before!r} must stand above {name!r}")
                elif before not in jobs:
                    hint = (
                        did_you_mean(before, earlier) or f"; jobs above are {', '.join(earlier) or '(none)'}"
                    )
                    yield Problem((name, "after", index), f"there is no job {before!r}{hint}")
            earlier.append(name)

    raise_any(problems())
    return jobs


class Chain(Section):
    """Jobs and the cluster they run on."""

    name: Name = Field(description="Name of the chain; a job is called NAME.JOB in the queue.")
    cluster: FilePath = Field(description="Cluster file.")
    run_dir: FilePath = Field(description="Folder for scripts, logs and the record of the jobs.")
    jobs: Annotated[dict[Key, Job], AfterValidator(_order)] = Field(
        description="Job name -> its recipe and what it waits for, in order."
    )
