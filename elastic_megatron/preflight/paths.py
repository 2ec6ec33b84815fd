"""Files and folders that jobs read and write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..files.json_files import read_object
from ..files.targets import nearest, writable
from ..recipe import JobChain, PlannedJob
from ..recipe.deploy import RECORD
from ..recipe.elastic import LatencyBudget
from ..recipe.objective import CACHE_HEADER
from .family import Found, ancestors, destinations


def path_problems(chain: JobChain, job: PlannedJob) -> Iterator[Found]:
    """Findings about one job's files, but for the model, which ``Families`` looks for."""
    for text in (*_data(job), *_others(job), *_cache(chain, job), *_export(chain, job)):
        yield "error", text
    for key, folder in _written(job):
        if not writable(folder):
            yield "error", f"{key}: {nearest(folder)} cannot be written to; choose another {key}"


def chain_folders(chain: JobChain) -> Iterator[Found]:
    """Findings about the folders that ``submit`` itself writes to."""
    for key, folder in (("run_dir", chain.run_dir), ("log_dir", chain.cluster.log_dir)):
        if folder is not None and not writable(folder):
            yield "error", f"{key} of the chain: {nearest(folder)} cannot be written to; choose another {key}"


def _written(job: PlannedJob) -> Iterator[tuple[str, Path]]:
    recipe = job.recipe
    yield "run_dir", recipe.run_dir
    if recipe.job != "export" and recipe.data.cache is not None:
        yield "data.cache", recipe.data.cache
    if recipe.job == "train" and recipe.teacher.cache is not None and not recipe.teacher.cache_only:
        yield "teacher.cache", recipe.teacher.cache
    if recipe.job == "export" and recipe.export is not None:
        yield from (("export.elastic", recipe.export.elastic),) if recipe.export.elastic else ()
        yield from (("export.slices", recipe.export.slices),) if recipe.export.slices else ()


def paths_of(chain: JobChain) -> Iterator[tuple[Path, str]]:
    """Every path that jobs read or write, and which setting names it."""
    yield chain.run_dir, "run_dir of the chain"
    for job in chain.jobs:
        recipe, name = job.recipe, job.name
        for key, folder in _written(job):
            yield folder, f"{name}: {key}"
        if recipe.job != "export":
            for source in (*recipe.data.train, *recipe.data.valid):
                yield source.path, f"{name}: data"
        for key, path in (
            ("model.hf", recipe.model.hf),
            ("model.checkpoint", recipe.model.checkpoint),
            ("model.tokenizer", recipe.model.tokenizer),
            ("teacher.checkpoint", recipe.teacher.checkpoint),
            ("teacher.cache", recipe.teacher.cache if recipe.teacher.cache_only else None),
        ):
            if path is not None:
                yield path, f"{name}: {key}"
        for budget, target in recipe.budgets.items():
            if isinstance(target, LatencyBudget):
                yield target.table, f"{name}: budgets.{budget}.table"


def _data(job: PlannedJob) -> Iterator[str]:
    read = {"train": ("train", "valid"), "rank": ("train",), "quantize": ("train", "valid")}
    for key in read.get(job.recipe.job, ()):
        for index, source in enumerate(getattr(job.recipe.data, key)):
            missing = [
                s for s in (".bin", ".idx") if not source.path.with_name(source.path.name + s).is_file()
            ]
            if missing:
                yield (
                    f"data.{key}.{index}.path: {source.path}{missing[0]} is missing; write it by: elastic-megatron "
                    f"prepare-data INPUT --output {source.path} --tokenizer DIR"
                )


def _others(job: PlannedJob) -> Iterator[str]:
    recipe = job.recipe
    if recipe.model.tokenizer is not None and not recipe.model.tokenizer.is_dir():
        yield f"model.tokenizer: {recipe.model.tokenizer} is no folder; name that of the model's tokenizer"
    for name, budget in recipe.budgets.items():
        if isinstance(budget, LatencyBudget) and not budget.table.is_file():
            yield f"budgets.{name}.table: {budget.table} is missing; measure it with tools/profile_latency.py"


def _cache(chain: JobChain, job: PlannedJob) -> Iterator[str]:
    """A job without a teacher finds what one said, or a job before it asks one."""
    teacher = job.recipe.teacher
    if job.recipe.job != "train" or teacher.cache is None or not teacher.cache_only:
        return
    before = [each.recipe for each in ancestors(chain, job).values() if each.recipe.job == "train"]
    asked = any(r.teacher.cache == teacher.cache and not r.teacher.cache_only for r in before)
    if not asked and not (teacher.cache / CACHE_HEADER).is_file():
        yield (
            f"teacher.cache: {teacher.cache} holds nothing that a teacher said; set teacher.cache_only=false, or name "
            "the folder of a run that asked one"
        )


def _export(chain: JobChain, job: PlannedJob) -> Iterator[str]:
    export = job.recipe.export
    if job.recipe.job != "export" or export is None:
        return
    ours = _exported(job)
    for key, folder in destinations(job):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and str(folder) not in ours:
            yield f"{key}: {folder} holds something that this recipe did not write; remove it, or choose another {key}"
        for other in chain.jobs[: [each.name for each in chain.jobs].index(job.name)]:
            if folder in [place for _, place in destinations(other)]:
                yield f"{key}: {folder} is written by job {other.name} too; choose another {key}"


def _exported(job: PlannedJob) -> set[str]:
    """Directories that the recipe's run folder says it wrote; a second run leaves them as they are."""
    try:
        return set(read_object(job.recipe.run_dir / RECORD, ""))
    except UserError:
        return set()
