"""The model that every job of a chain will find: what is on disk, or what an earlier job will have made of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ..checkpoint.manifest import FILE, Manifest
from ..checkpoint.quantised_plan import planned_by
from ..checkpoint.resolve import budgets, elastic_space, hf_manifest
from ..checkpoint.tracker import resolve
from ..errors import UserError
from ..recipe import JobChain, PlannedJob, Recipe
from ..space import ElasticSpace, ParentShape, SubmodelSpec

Found = tuple[Literal["error", "warning"], str]

PENDING = "ranked by an earlier job"


@dataclass(frozen=True)
class Family:
    """What a job finds and what it leaves behind.

    Args:
        parent: description of the model it starts from, ``submodels`` without widths where they are still to be
            chosen.
        space: the widths that it works with; ``None`` for a job that is not elastic.
        frozen: are these widths those of submodels that the job takes as they are?
        teacher: shape of the frozen model, where there is one.
        result: description of what it writes.
    """

    parent: Manifest
    space: ElasticSpace | None
    teacher: ParentShape | None
    result: Manifest
    frozen: bool = False

    @property
    def shape(self) -> ParentShape:
        return self.parent.shape


def is_frozen(recipe: Recipe) -> bool:
    """Does the job take the submodels of its model as they are?"""
    return recipe.job == "quantize" or (recipe.job == "train" and recipe.router_frozen)


def ancestors(chain: JobChain, job: PlannedJob) -> dict[str, PlannedJob]:
    """Jobs that must have succeeded before this one, directly or not, in the order of the chain."""
    needed, waiting = set[str](), list(job.after)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += chain.job(name).after
    return {other.name: other for other in chain.jobs if other.name in needed}


def maker(chain: JobChain, path: Path) -> list[PlannedJob]:
    """Jobs that write the checkpoints that a path means: a run folder, its checkpoints, or one of them."""
    return [
        job
        for job in chain.jobs
        if job.recipe.job != "export"
        and (path == job.recipe.run_dir or path.is_relative_to(job.recipe.run_dir / "checkpoints"))
    ]


def exporter(chain: JobChain, path: Path) -> list[PlannedJob]:
    """Jobs that write this Hugging Face directory."""
    return [job for job in chain.jobs if path in [place for _, place in destinations(job)]]


def destinations(job: PlannedJob) -> list[tuple[str, Path]]:
    """Directories that an export job writes, and the setting that names each."""
    export = job.recipe.export if job.recipe.job == "export" else None
    if export is None:
        return []
    out = [("export.elastic", export.elastic)] if export.elastic else []
    return out + [("export.slices", export.slices / n) for n in export.submodels if export.slices]


class Families:
    """The families of a chain's jobs, each worked out once.

    ``of`` raises ``UserError`` where a job's model cannot be found; the message is the finding.
    """

    def __init__(self, chain: JobChain) -> None:
        self.chain = chain
        self._known: dict[str, Family | UserError] = {}

    def of(self, job: PlannedJob) -> Family:
        if job.name not in self._known:
            try:
                self._known[job.name] = self._work_out(job)
            except UserError as error:
                self._known[job.name] = error
        found = self._known[job.name]
        if isinstance(found, UserError):
            raise found
        return found

    def told(self, job: PlannedJob) -> bool:
        """Is what keeps the job's model from being found an earlier job's finding already?"""
        mine = self._known.get(job.name)
        earlier = [self._known.get(name) for name in ancestors(self.chain, job)]
        return mine is not None and any(mine is other for other in earlier)

    def _work_out(self, job: PlannedJob) -> Family:
        recipe = job.recipe
        parent = self.parent(job)
        space, frozen = parent.space, is_frozen(recipe)
        if recipe.job != "export" and not frozen:
            elastic = recipe.job == "rank" or bool(recipe.budgets)
            space = elastic_space(recipe, parent) if elastic else None
        teacher = None
        asked = recipe.loss.kind != "cross_entropy" and not recipe.teacher.cache_only
        if recipe.job in ("train", "quantize") and asked:
            chosen = recipe.teacher.checkpoint
            teacher = (
                parent.shape if chosen is None else self._stored(job, "teacher.checkpoint", chosen).shape
            )
        return Family(parent, space, teacher, _result(job, parent, space), frozen)

    def parent(self, job: PlannedJob) -> Manifest:
        """Description of the model that a job starts from. Raises ``UserError`` where it cannot be found."""
        model = job.recipe.model
        if model.sizes is not None:
            return Manifest(shape=ParentShape.from_dict(model.sizes.model_dump()))
        if model.hf is not None:
            return self._hf(job, model.hf)
        assert model.checkpoint is not None, "the recipe checks that one of hf, checkpoint and sizes is there"
        return self._stored(job, "model.checkpoint", model.checkpoint)

    def _stored(self, job: PlannedJob, key: str, path: Path) -> Manifest:
        made = self._earlier(job, key, path, maker(self.chain, path))
        if made is not None:
            return self.of(made).result
        with _named(key):
            return Manifest.read(resolve(path) / FILE)

    def _hf(self, job: PlannedJob, path: Path) -> Manifest:
        made = self._earlier(job, "model.hf", path, exporter(self.chain, path))
        if made is None:
            with _named("model.hf"):
                return hf_manifest(path)
        export = made.recipe.export
        assert export is not None
        if path != export.elastic:
            raise UserError(
                f"model.hf: {path} is a submodel whose widths are yet to be learnt; start from the elastic export of "
                f"{made.name}, or submit this job once that one is done"
            )
        return self.of(made).result

    def _earlier(self, job: PlannedJob, key: str, path: Path, makers: list[PlannedJob]) -> PlannedJob | None:
        """The last of a path's makers before the job; ``None`` where only the disk can have it."""
        before = ancestors(self.chain, job)
        if known := [made for made in makers if made.name in before]:
            return known[-1]
        others = [made for made in makers if made.name != job.name]
        if not others:
            return None
        other, names = others[-1], [each.name for each in self.chain.jobs]
        add = f"add {other.name} to jobs.{job.name}.after"
        if names.index(other.name) > names.index(job.name):
            add = f"move job {other.name} above {job.name} and {add}"
        raise UserError(f"{key}: {path} is written by job {other.name}, which need not be done before; {add}")


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Errors begin with the setting that named the path."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _result(job: PlannedJob, parent: Manifest, space: ElasticSpace | None) -> Manifest:
    """What a job leaves: the same shape, and the family as far as it is known before it ran."""
    recipe = job.recipe
    if recipe.job == "export":
        return parent
    quantised = planned_by(recipe.quantize, parent.shape) if recipe.quantize is not None else None
    result = replace(parent, quantised=quantised)
    if recipe.job == "rank":
        return replace(result, space=space, ranking=PENDING)
    if recipe.job == "quantize":
        return result
    named, known = budgets(recipe), parent.submodels if is_frozen(recipe) else {}
    submodels = {budget.name: known.get(budget.name, SubmodelSpec()) for budget in named}
    return replace(result, space=space, budgets=named, submodels=submodels)


def own_steps(chain: JobChain, job: PlannedJob) -> Iterator[tuple[int, int]]:
    """(index of a stage, steps of it that this job does); earlier jobs in the same run folder did the rest."""
    recipe, done = job.recipe, 0
    for other in ancestors(chain, job).values():
        if other.recipe.job == "train" and other.recipe.run_dir == recipe.run_dir:
            done = max(done, other.recipe.last_step)
    first = 0
    for index, stage in enumerate(recipe.stages):
        last = min(first + stage.steps, recipe.last_step)
        if steps := max(0, last - max(first, done)):
            yield index, steps
        first += stage.steps
