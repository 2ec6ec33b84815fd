"""From a chain (or a single recipe) to the jobs that are submitted: every file read, every setting resolved."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

from elastic_megatron.errors import UserError
from elastic_megatron.recipe import messages
from elastic_megatron.recipe.chain import Chain, Job
from elastic_megatron.recipe.cluster import Cluster
from elastic_megatron.recipe.load import Document, read
from elastic_megatron.recipe.schema import Recipe
from elastic_megatron.recipe.sources import Sources
from elastic_megatron.recipe.types import Problem, did_you_mean

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class PlannedJob:
    """One job: its recipe, with `parallel.world_size` filled in, and what it asks for.

    `source` is the recipe's file; `time` is as Slurm writes it.
    """

    name: str
    source: Path
    recipe: Recipe
    after: tuple[str, ...]
    nodes: int
    ranks_per_node: int
    time: str

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class JobChain:
    """What `submit` submits, in an order in which every job stands behind those that it needs."""

    name: str
    run_dir: Path
    source: Path
    cluster_file: Path | None
    cluster: Cluster
    jobs: tuple[PlannedJob, ...]

    def job(self, name: str) -> PlannedJob:
        """The job of this name. Raises UserError with the names that there are."""
        for job in self.jobs:
            if job.name == name:
                return job
        names = [job.name for job in self.jobs]
        raise UserError(f"there is no job {name!r}{did_you_mean(name, names)}; jobs are {', '.join(names)}")


def is_chain(path: str | PathLike[str]) -> bool:
    """Does the file describe a chain, or else a recipe? False also for a file that cannot be read."""
    root = Sources().file(fspath(path))
    return root is not None and isinstance(root.value, dict) and "jobs" in root.value


def load_jobs(path: str | PathLike[str], overrides: Sequence[str] = ()) -> JobChain:
    """The jobs of a chain file, or the one job of a recipe.

    Overrides of a chain: `JOB.key=value` for the recipe of a job, `cluster.key=value` for the cluster file, and
    `name`, `run_dir`, `cluster` of the chain itself. Overrides of a recipe are the recipe's, but for `cluster.key`.
    Raises UserError with one line per problem, over all files at once.
    """
    reader = _Reader(fspath(path), overrides)
    found = reader.chain() if is_chain(path) else reader.single()
    if found is None or reader.problems:
        raise UserError("\n".join(reader.problems))
    return found


class _Reader:
    def __init__(self, path: str, overrides: Sequence[str]) -> None:
        self.path, self.problems = path, list[str]()
        self.of_cluster = [o.removeprefix("cluster.") for o in overrides if o.startswith("cluster.")]
        self.overrides = [o for o in overrides if not o.startswith("cluster.")]

    def chain(self) -> JobChain | None:
        names = self._job_names()
        own = [o for o in self.overrides if self._job_of(o) not in names]
        document = read(Chain, self.path, [o for o in own if self._is_chain_key(o, names)], self.problems)
        if document is None:
            return None
        chain = document.value
        cluster = self._cluster(chain.cluster, document)
        jobs = [self._job(name, job, cluster, document) for name, job in chain.jobs.items()]
        if cluster is None or None in jobs:
            return None
        done = tuple(job for job in jobs if job is not None)
        return JobChain(chain.name, chain.run_dir, Path(self.path), chain.cluster, cluster, done)

    def single(self) -> JobChain | None:
        document = read(Recipe, self.path, self.overrides, self.problems)
        if document is None:
            return None
        recipe = document.value
        if (file := recipe.slurm.cluster) is None:
            cluster = Cluster()
            if self.of_cluster:
                self.problems.append("cluster: no file is named; write slurm.cluster=FILE")
        else:
            cluster = self._cluster(file, document)
        job = cluster and self._planned(recipe.job, Path(self.path), document, (), cluster)
        if cluster is None or job is None:
            return None
        return JobChain(recipe.name, recipe.run_dir, Path(self.path), file, cluster, (job,))

    def _job_names(self) -> list[str]:
        root = Sources().file(self.path)
        jobs = root.value.get("jobs") if root is not None and isinstance(root.value, dict) else None
        return list(jobs.value) if jobs is not None and isinstance(jobs.value, dict) else []

    @staticmethod
    def _job_of(override: str) -> str:
        return override.partition("=")[0].strip().partition(".")[0]

    def _is_chain_key(self, override: str, names: list[str]) -> bool:
        """Otherwise the mistake is reported here: it may be the name of a job that was meant."""
        key = self._job_of(override)
        if key in Chain.model_fields or "=" not in override:
            return True
        known = [*names, "cluster", *Chain.model_fields]
        hint = did_you_mean(key, known) or f"; overrides of a chain begin with {', '.join(known)}"
        self.problems.append(f"{COMMAND_LINE} `{override}`: there is no job {key!r}{hint}")
        return False

    def _cluster(self, file: Path, document: Document[Chain] | Document[Recipe]) -> Cluster | None:
        key = "cluster" if isinstance(document.value, Chain) else "slurm.cluster"
        where = document.root.locate(tuple(key.split("."))).where
        found = read(Cluster, _shown(file), self.of_cluster, self.problems, f"{where}: {key}: ", "cluster.")
        return None if found is None else found.value

    def _job(self, name: str, job: Job, cluster: Cluster | None, chain: Document[Chain]) -> PlannedJob | None:
        where = chain.root.locate(("jobs", name, "recipe")).where
        own = [o.strip().removeprefix(f"{name}.") for o in self.overrides if self._job_of(o) == name]
        asked_at = f"{where}: jobs.{name}.recipe: "
        document = read(Recipe, _shown(job.recipe), own, self.problems, asked_at, f"{name}.")
        if document is None or cluster is None:
            return None
        return self._planned(name, job.recipe, document, job.after, cluster)

    def _planned(
        self, name: str, source: Path, document: Document[Recipe], after: tuple[str, ...], cluster: Cluster
    ) -> PlannedJob | None:
        """The job with its number of ranks; whether they suit its layout is for `preflight` to say."""
        recipe = document.value
        slurm, parallel = recipe.slurm, recipe.parallel
        one = recipe.job == "export"  # conversion is one process
        per_node = 1 if one else slurm.ranks_per_node or cluster.gpus_per_node or 1
        ranks = slurm.nodes * per_node
        found: list[Problem] = []
        if one and slurm.nodes > 1:
            found.append(Problem(("slurm", "nodes"), "export runs in one process; leave it out"))
        elif not one:
            if parallel.world_size not in (None, ranks):
                text = (
                    f"{parallel.world_size} is not slurm.nodes {slurm.nodes} x {per_node} ranks a node = {ranks}; "
                    "change slurm.nodes, or leave world_size out"
                )
                found.append(Problem(("parallel", "world_size"), text))
            parallel = parallel.model_copy(update={"world_size": ranks})
            recipe = recipe.model_copy(update={"parallel": parallel})
        self.problems += messages.lines(found, document.root)
        time = slurm.time or cluster.time
        return None if found else PlannedJob(name, source, recipe, after, slurm.nodes, per_node, time)


def _shown(path: Path) -> str:
    """A path as a person would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
