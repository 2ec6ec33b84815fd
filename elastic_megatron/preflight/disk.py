"""Room for checkpoints, exports and what teachers said, disk by disk."""

from __future__ import annotations

import shutil
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..checkpoint.hf_quantised import stored_bytes
from ..cost import account
from ..errors import UserError
from ..recipe import JobChain, PlannedJob
from ..recipe.objective import cached_bytes
from ..recipe.training import tokens_after
from ..space import ElasticSpace, SubmodelSpec
from .family import Families, Family, Found, destinations
from .paths import nearest, writable

_GIB = 2**30


def disk_problems(chain: JobChain, families: Families) -> Iterator[Found]:
    """A finding for each disk that has less room than the chain will write to it."""
    keeps = {job.name: job.recipe.checkpoint.keep_last for job in chain.jobs if job.recipe.job == "train"}
    for place, size in wanted(chain, families, keeps).items():
        free = shutil.disk_usage(place).free
        if size <= free:
            continue
        text = f"{place} has {free / _GIB:.1f} GiB free, the chain will write {size / _GIB:.1f} GiB to it"
        yield "error", f"{text}; {_remedy(chain, families, keeps, place, size - free)}"


def _remedy(chain: JobChain, families: Families, keeps: Mapping[str, int], place: Path, lacking: int) -> str:
    """To keep as many checkpoints as there is room for, or else to make room."""

    def too_large(keep: int) -> bool:
        sizes = wanted(chain, families, {name: min(keep, kept) for name, kept in keeps.items()})
        return sizes[place] > shutil.disk_usage(place).free

    most = bisect_left(range(1, max(keeps.values(), default=1)), True, key=too_large)
    if most == 0:
        cached = any(job.recipe.teacher.cache is not None for job in chain.jobs)
        other = "a smaller teacher.top_k, or another disk" if cached else "a run_dir on another disk"
        return f"free {lacking / _GIB:.1f} GiB there, or choose {other}"
    return "set " + " and ".join(
        f"{n}.checkpoint.keep_last={most}" for n, kept in keeps.items() if kept > most
    )


def wanted(chain: JobChain, families: Families, keeps: Mapping[str, int]) -> dict[Path, int]:
    """Bytes that jobs will write beyond what is there, by disk, each named by a folder on it.

    Args:
        keeps: name of a training job -> checkpoints that it keeps; one more is there while it is written.
    """
    folders: dict[Path, int] = {}
    for job in chain.jobs:
        try:
            family = families.of(job)
        except UserError:
            continue  # a finding of its own
        if job.recipe.job == "export":
            folders |= export_bytes(job, family)
            continue
        folder = job.recipe.run_dir / "checkpoints"
        size = checkpoint_bytes(job, family) * (keeps.get(job.name, 0) + 1)
        folders[folder] = max(folders.get(folder, 0), size)
        cache = job.recipe.teacher.cache
        if cache is not None:
            # jobs that share a folder may meet the same sequences
            folders[cache] = max(folders.get(cache, 0), cache_bytes(job, family))
    disks: dict[int, Path] = {}
    out: dict[Path, int] = {}
    for folder, size in folders.items():
        if not writable(folder):
            continue  # likewise
        place = disks.setdefault(nearest(folder).stat().st_dev, nearest(folder))
        out[place] = out.get(place, 0) + max(0, size - _there(folder))
    return out


def _there(folder: Path) -> int:
    """Bytes of the files in a folder, which later ones will replace."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else 0


def copies(job: PlannedJob) -> int:
    """Checkpoints at one time: those that are kept, and the one being written."""
    return job.recipe.checkpoint.keep_last + 1 if job.recipe.job == "train" else 1


def checkpoint_bytes(job: PlannedJob, family: Family) -> int:
    """Weights, and in training what Adam saves of each, whatever their type: an fp32 copy and two fp32 moments."""
    weight = 2 if job.recipe.model.dtype == "bf16" else 4
    adam = 12 if job.recipe.job == "train" else 0
    return account(family.shape).total_params * (weight + adam)


def cache_bytes(job: PlannedJob, family: Family) -> int:
    """What a teacher's cache keeps of all tokens that a job trains on; no run sees a sequence twice."""
    recipe = job.recipe
    if recipe.job != "train" or recipe.teacher.cache_only:
        return 0
    top_k = min(recipe.teacher.top_k, family.shape.vocab_size)
    return cached_bytes(tokens_after(recipe.last_step, recipe.stages), top_k)


def export_bytes(job: PlannedJob, family: Family) -> dict[Path, int]:
    """Bytes of each directory; a submodel that is still to be chosen is taken for the whole."""
    export, parent = job.recipe.export, family.parent
    assert export is not None
    rest = 4 if export.dtype == "fp32" or (export.dtype is None and job.recipe.model.dtype == "fp32") else 2
    whole = parent.space or ElasticSpace(family.shape, ())
    out: dict[Path, int] = {}
    for key, path in destinations(job):
        spec = parent.submodels.get(path.name, SubmodelSpec()) if key == "export.slices" else SubmodelSpec()
        spec = spec if spec.widths else whole.full()
        if parent.quantised is not None:
            out[path] = stored_bytes(parent.quantised, whole, spec, rest=rest)
        else:
            out[path] = account(whole, spec).total_params * rest
    return out
