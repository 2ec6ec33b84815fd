"""From a chain (or a single recipe) to the jobs that are submitted: every file read, every setting resolved."""

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

from elastic_megatron.errors import UserError
from elastic_megatron.recipe import messages
from elastic_megatron.recipe.chain import Chain
from elastic_megatron.recipe.cluster import Cluster
from elastic_megatron.recipe.document import Node
from elastic_megatron.recipe.load import Opened, kind_of, open_file, parse, read
from elastic_megatron.recipe.schema import Recipe
from elastic_megatron.recipe.slurm import Once
from elastic_megatron.recipe.sources import Sources
from elastic_megatron.recipe.types import Problem, absolute, did_you_mean, seconds, show_path

MOST_JOBS = 200


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
    return root is not None and _describes_chain(root)


def load_jobs(path: str | PathLike[str], overrides: Sequence[str] = ()) -> JobChain:
    """The jobs of a chain file, or the one job of a recipe.

    Overrides of a chain: `JOB.key=value` for the recipe of a job, `cluster.key=value` for the cluster file, and the
    keys of the chain itself. Overrides of a recipe are the recipe's, but for `cluster.key=value`; `cluster=FILE` is
    short for `slurm.cluster=FILE`. Raises UserError with one line per problem, over all files at once.
    """
    reader = _Reader(fspath(path), overrides)
    found = reader.jobs()
    if found is None or reader.problems:
        raise UserError("\n".join(dict.fromkeys(reader.problems)))
    return found


def _describes_chain(root: Node) -> bool:
    return isinstance(root.value, dict) and ("jobs" in root.value or kind_of(root) is Chain)


class _Reader:
    """Reads all files of a chain, also where some are wrong, so that every problem is found at once."""

    def __init__(self, path: str, overrides: Sequence[str]) -> None:
        self.path, self.problems = path, list[str]()
        stripped = [override.strip() for override in overrides]
        self.of_cluster = [o.removeprefix("cluster.") for o in stripped if o.startswith("cluster.")]
        self.overrides = [o for o in stripped if not o.startswith("cluster.")]

    def jobs(self) -> JobChain | None:
        opened = open_file(self.path, self.problems, "recipe")
        if opened is None:
            return None
        return self._chain(opened) if _describes_chain(opened.root) else self._single(opened)

    def _chain(self, opened: Opened) -> JobChain | None:
        own = [o for o in self.overrides if _first_key(o) in Chain.model_fields]
        document = parse(Chain, opened, own, self.problems)
        if document is None:
            return None
        root, chain = document.root, document.value
        jobs = root.value.get("jobs") if isinstance(root.value, dict) else None
        names = list(jobs.value) if jobs is not None and isinstance(jobs.value, dict) else []
        if len(names) > MOST_JOBS:
            where = root.locate(("jobs",)).where
            self.problems.append(f"{where}: jobs: {len(names)} are too many; {MOST_JOBS} at most")
            return None
        for override in self.overrides:
            self._meant(override, names)
        file = _path(root, ("cluster",))
        cluster = None if file is None else self._cluster(file, root, ("cluster",))
        planned = [self._job(name, root, chain, cluster) for name in names]
        jobs = tuple(job for job in planned if job is not None)
        if chain is None or cluster is None or len(jobs) < len(names):
            return None
        return JobChain(chain.name, chain.run_dir, Path(self.path), file, cluster, jobs)

    def _single(self, opened: Opened) -> JobChain | None:
        own = [
            o.replace("cluster", "slurm.cluster", 1) if _first_key(o) == "cluster" else o
            for o in self.overrides
        ]
        document = parse(Recipe, opened, own, self.problems)
        if document is None:
            return None
        recipe, file, cluster = document.value, _path(document.root, ("slurm", "cluster")), None
        if file is not None:
            cluster = self._cluster(file, document.root, ("slurm", "cluster"))
        elif recipe is not None and recipe.slurm.cluster is None:
            cluster = Cluster()
            for override in self.of_cluster:
                self._refuse(f"cluster.{override}", "no cluster file is named; add cluster=FILE")
        if recipe is None or cluster is None:
            return None
        job = self._planned(recipe.job, Path(self.path), recipe, document.root, (), cluster)
        return job and JobChain(recipe.name, recipe.run_dir, Path(self.path), file, cluster, (job,))

    def _meant(self, override: str, names: Collection[str]) -> None:
        """Complain about an override of a chain that is nobody's."""
        key, (before, equals, _) = _first_key(override), override.partition("=")
        known = [*names, *Chain.model_fields]
        if not equals and key not in known:
            self._refuse(override, "write it as JOB.key=value, such as cluster.account=NAME")
        elif key in names and "." not in before:
            self._refuse(override, f"{key} is a job; name a key of its recipe: {key}.key=value")
        elif key not in known:
            hint = did_you_mean(key, known) or f"; overrides of a chain begin with {', '.join(known)}"
            self._refuse(override, f"there is no job {key!r}{hint}")

    def _refuse(self, override: str, text: str) -> None:
        self.problems.append(f"command line `{' '.join(override.split())}`: {text}")

    def _cluster(self, file: Path, root: Node, at: tuple[str, ...]) -> Cluster | None:
        asked_at = f"{root.locate(at).where}: {show_path(at)}: "
        document = read(Cluster, shown_path(file), self.of_cluster, self.problems, asked_at, "cluster.")
        if document is None or document.value is None:
            return None
        template = document.value.template
        if template is not None and not template.is_file():
            missing = Problem(("template",), f"{shown_path(template)}: no such file")
            self.problems += messages.lines([missing], document.root)
        return document.value

    def _job(self, name: str, root: Node, chain: Chain | None, cluster: Cluster | None) -> PlannedJob | None:
        at = ("jobs", name, "recipe")
        file = _path(root, at)
        if file is None:
            return None
        own = [o.removeprefix(f"{name}.") for o in self.overrides if o.startswith(f"{name}.")]
        asked_at = f"{root.locate(at).where}: {show_path(at)}: "
        document = read(Recipe, shown_path(file), own, self.problems, asked_at, f"{name}.")
        if document is None or document.value is None or cluster is None:
            return None
        after = chain.jobs[name].after if chain is not None else ()
        return self._planned(name, file, document.value, document.root, after, cluster)

    def _planned(
        self, name: str, source: Path, recipe: Recipe, root: Node, after: tuple[str, ...], cluster: Cluster
    ) -> PlannedJob | None:
        """The job with its number of ranks."""
        slurm, one = recipe.slurm, recipe.job == "export"  # conversion is one process
        per_node = 1 if one else slurm.ranks_per_node or cluster.gpus_per_node or 1
        time = slurm.time or cluster.time
        if problems := list(_problems(recipe, per_node, time)):
            self.problems += messages.lines(problems, root)
            return None
        if not one:
            parallel = recipe.parallel.model_copy(update={"world_size": slurm.nodes * per_node})
            recipe = recipe.model_copy(update={"parallel": parallel})
        return PlannedJob(name, source, recipe, after, slurm.nodes, per_node, time)


def _problems(recipe: Recipe, per_node: int, time: str) -> Iterator[Problem]:
    """What a recipe and its cluster file disagree about."""
    slurm, world = recipe.slurm, recipe.parallel.world_size
    ranks = slurm.nodes * per_node
    if recipe.job == "export":
        if slurm.nodes > 1:
            yield Problem(("slurm", "nodes"), "export runs in one process; leave it out")
    elif world not in (None, ranks):
        text = (
            f"{world} is not slurm.nodes {slurm.nodes} x {per_node} ranks a node = {ranks}; "
            "change slurm.nodes, or leave world_size out"
        )
        yield Problem(("parallel", "world_size"), text)
    continuation = slurm.continuation
    if recipe.job == "train" and not isinstance(continuation, Once) and continuation.lead >= seconds(time):
        lead = continuation.lead
        text = f"{lead} s before the end of a job of {time} is before its beginning; lower it or raise slurm.time"
        yield Problem(("slurm", "continuation", "lead"), text)


def _first_key(override: str) -> str:
    return override.partition("=")[0].strip().partition(".")[0]


def _path(root: Node, at: tuple[str, ...]) -> Path | None:
    """The path that is written there; None where there is none, or none that can be used."""
    node: Node | None = root
    for key in at:
        node = node.value.get(key) if node is not None and isinstance(node.value, dict) else None
    try:
        return None if node is None else absolute(node.plain())
    except ValueError:
        return None


def shown_path(path: Path) -> str:
    """A path as a person would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
