"""The jobs of a plan: steps, tokens, floating-point operations, GPU-hours, memory and disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..cost.layout import check_setting
from ..cost.rank_memory import Load, memory_per_rank
from ..cost.setting import Setting
from ..preflight.disk import checkpoint_bytes, copies, export_bytes
from ..preflight.family import Families, Family
from ..preflight.layout import setting_of as setting_of_job
from ..preflight.memory import fullest
from ..preflight.work import job_gpu_hours, slurm_jobs, work
from ..recipe import JobChain, PlannedJob, is_chain, load, load_jobs
from ..recipe.cluster import Cluster


def chain_of(source: Path, overrides: Sequence[str]) -> JobChain:
    """The jobs of a chain or recipe. A recipe that says nothing of SLURM has as many ranks as it says itself.

    Raises ``UserError`` as ``load_jobs``.
    """
    if is_chain(source) or any(override.startswith("cluster.") for override in overrides):
        return load_jobs(source, overrides)
    recipe = load(source, overrides)
    if "slurm" in recipe.model_fields_set:
        return load_jobs(source, overrides)
    cluster = Cluster()
    job = PlannedJob(recipe.job, source, recipe, (), recipe.parallel.world_size or 1, 1, cluster.time)
    return JobChain(recipe.name, recipe.run_dir, source, None, cluster, (job,))


def setting_of(chain: JobChain, job: PlannedJob, family: Family) -> Setting:
    """What the rules of layouts read; of one process for a job that converts. Where a recipe trains nothing yet, its
    calibration pass counts."""
    found = setting_of_job(chain, job, family)
    if found is None:
        return Setting.of(family.shape, family.space, job.recipe.parallel)
    return found if found.stages or found.calibration else replace(found, calibration=job.recipe.rank)


def fullest_load(chain: JobChain, job: PlannedJob, family: Family) -> tuple[str, Load]:
    """The most that a rank of the job computes at a time, and what it is called; a calibration pass where nothing is
    trained."""
    recipe = job.recipe
    if (found := fullest(chain, job, family)) is None:
        rank = recipe.rank
        return "rank", Load(rank.seq_length, rank.micro_batch_size, recipe.model.dtype, training=False)
    key, load = found
    return f"stage {recipe.stages[int(key[7:])].name}" if key.startswith("stages.") else key, load


def jobs_of(chain: JobChain, families: Families) -> dict[str, dict[str, Any]]:
    """Job -> what it takes; the keys are those of ``plan --help``."""
    return {job.name: _job(chain, job, families.of(job)) for job in chain.jobs}


def _job(chain: JobChain, job: PlannedJob, family: Family) -> dict[str, Any]:
    export, card = job.recipe.job == "export", chain.cluster.card
    known = export or job.recipe.parallel.world_size is not None
    flops, steps, tokens = work(chain, job, family)
    hours = job_gpu_hours(chain, job, family)
    setting = setting_of(chain, job, family)
    parallel, where = setting.parallel, None if export else fullest(chain, job, family)
    fits = parallel.pipeline * (parallel.virtual_pipeline or 1) <= family.shape.num_layers
    memory = memory_per_rank(family.shape, parallel, where[1]) if where and fits else None
    one = sum(export_bytes(job, family).values()) if export else checkpoint_bytes(job, family)
    return {
        "job": job.recipe.job,
        "ranks": job.ranks if known else None,
        "steps": steps,
        "tokens": tokens,
        "flops": flops,
        "gpu_hours": hours,
        "hours": [h / job.ranks for h in hours] if hours is not None and known else None,
        "slurm_jobs": slurm_jobs(job, hours[1]) if hours is not None and known else None,
        "memory_per_rank": memory,
        "memory_limit": card.memory_gib * 2**30 if card is not None else None,
        "checkpoint_bytes": one,
        "disk_bytes": one * copies(job),
        "problems": [] if export else check_setting(setting),
    }
