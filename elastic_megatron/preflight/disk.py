"""Room for checkpoints and exports, disk by disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from ..cost import account
from ..errors import UserError
from ..recipe import JobChain, PlannedJob
from .family import Families, Family, Found
from .paths import destinations, nearest

_GIB = 2**30


def disk_problems(chain: JobChain, families: Families) -> Iterator[Found]:
    """A finding for each disk that has less room than the chain will write to it."""
    wanted: dict[int, int] = {}
    places: dict[int, Path] = {}
    for path, size in written(chain, families).items():
        place = nearest(path)
        device = place.stat().st_dev
        wanted[device] = wanted.get(device, 0) + size
        places.setdefault(device, place)
    for device, size in wanted.items():
        free = shutil.disk_usage(places[device]).free
        if size > free:
            yield (
                "error",
                f"{places[device]} has {free / _GIB:.1f} GiB free, checkpoints and exports of this chain take "
                f"{size / _GIB:.1f} GiB{_lower(chain)}; free space, or set run_dir to another disk",
            )


def _lower(chain: JobChain) -> str:
    kept = max(
        (job.recipe.checkpoint.keep_last for job in chain.jobs if job.recipe.job == "train"), default=1
    )
    return f" (checkpoint.keep_last={kept}, and the one being written)" if kept > 1 else ""


def written(chain: JobChain, families: Families) -> dict[Path, int]:
    """Bytes at a time in each folder that jobs write; jobs without a known model are left out."""
    out: dict[Path, int] = {}
    for job in chain.jobs:
        try:
            family = families.of(job)
        except UserError:
            continue
        if job.recipe.job == "export":
            for path, size in export_bytes(job, family).items():
                out[path] = size
        else:
            folder = job.recipe.run_dir / "checkpoints"
            out[folder] = max(out.get(folder, 0), checkpoint_bytes(job, family) * copies(job))
    return out


def copies(job: PlannedJob) -> int:
    """Checkpoints at one time: those that are kept, and the one being written."""
    return job.recipe.checkpoint.keep_last + 1 if job.recipe.job == "train" else 1


def checkpoint_bytes(job: PlannedJob, family: Family) -> int:
    """Weights, and in training what Adam saves of each, whatever their type: an fp32 copy and two fp32 moments."""
    weight = 2 if job.recipe.model.dtype == "bf16" else 4
    adam = 12 if job.recipe.job == "train" else 0
    return account(family.shape).total_params * (weight + adam)


def export_bytes(job: PlannedJob, family: Family) -> dict[Path, int]:
    """Bytes of each directory; a submodel that is still to be chosen is taken for the whole."""
    export = job.recipe.export
    assert export is not None
    size = 4 if export.dtype == "fp32" or (export.dtype is None and job.recipe.model.dtype == "fp32") else 2
    whole = account(family.shape).total_params * size
    out: dict[Path, int] = {}
    for key, path in destinations(job):
        spec = family.parent.submodels.get(path.name) if key == "export.slices" else None
        known = spec is not None and family.parent.space is not None and bool(spec.widths)
        out[path] = account(family.parent.space, spec).total_params * size if known else whole  # type: ignore[arg-type]
    return out
