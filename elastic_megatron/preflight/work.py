"""What a job computes, and how long that takes on the GPU that the cluster file names."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from ..cost.draws import chances
from ..cost.sizes import ModelSizes, sizes_of_spec
from ..cost.work import PUBLISHED_UTILIZATION, Fed, forward_flops, gpu_hours, ranking_flops, training_flops
from ..recipe import JobChain, PlannedJob, Recipe
from ..recipe.cluster import Cluster
from ..recipe.slurm import Links, Once
from ..recipe.training import Stage
from ..recipe.types import seconds
from ..space import ParentShape, SubmodelSpec
from .family import Family, Found, own_steps


def work(chain: JobChain, job: PlannedJob, family: Family) -> tuple[float, int, int]:
    """(floating-point operations, optimiser steps, tokens) of a job; what an earlier job did of a run is not its.

    Tokens are those that are trained on; without training, those of the pass over data.
    """
    recipe = job.recipe
    if recipe.job == "train":
        own = [(recipe.stages[index], steps) for index, steps in own_steps(chain, job)]
        fed = [Fed(steps * stage.global_batch_size, stage.seq_length) for stage, steps in own]
        recompute = recipe.parallel.recompute == "full"
        flops = sum(
            training_flops(_students(recipe, stage, family), family.teacher, each, recompute=recompute)
            for (stage, _), each in zip(own, fed, strict=True)
        )
        flops += _calibration(job, family)[0]
        return flops, sum(steps for _, steps in own), sum(each.tokens for each in fed)
    if recipe.job == "rank":
        rank, axes = recipe.rank, set(recipe.space.choices)
        samples, batch = Fed(rank.samples, rank.seq_length), Fed(rank.micro_batch_size, rank.seq_length)
        widths, depth = bool(axes - {"num_layers"}), "num_layers" in axes
        return ranking_flops(family.shape, samples, batch, widths=widths, depth=depth), 0, samples.tokens
    if recipe.job == "quantize":
        flops, tokens = _calibration(job, family)
        return flops, 0, tokens
    return 0.0, 0, 0


def _students(recipe: Recipe, stage: Stage, family: Family) -> list[tuple[float, ParentShape | ModelSizes]]:
    """How often a stage runs which model on its tokens.

    Widths that are frozen are computed alone, unless they are to be masked; those that a router is yet to choose count
    as the whole model, which they are while they are mixed.
    """
    odds = recipe.budget_probabilities(stage)
    if not odds or family.space is None:
        return [(1.0, family.shape)]
    drawn = dict(zip(odds, chances(tuple(odds.values()), stage.budgets_per_batch), strict=True))
    if not family.frozen or stage.execution == "masked":
        return [(sum(drawn.values()), family.shape)]
    known = family.result.submodels
    return [(share, sizes_of_spec(family.space, known[name])) for name, share in drawn.items()]


def _calibration(job: PlannedJob, family: Family) -> tuple[float, int]:
    """(floating-point operations, tokens) of quantising: the whole model and every submodel, as a mask of it, are fed
    all samples."""
    quantize, specs = job.recipe.quantize, family.result.submodels
    if quantize is None:
        return 0.0, 0
    pinned = {b.name for b in family.result.budgets if (b.unit, b.target) == ("ratio", 1)}
    full = family.space.full() if family.space is not None else SubmodelSpec()
    smaller = {n: s for n, s in specs.items() if (s != full if s.widths else n not in pinned)}
    fed = Fed(quantize.samples * (1 + len(smaller)), quantize.seq_length)
    return forward_flops(family.shape, fed), fed.tokens


def utilizations(cluster: Cluster) -> tuple[float, float]:
    """The least and the largest share of a card's peak that its training may reach; one where the file knows it."""
    if cluster.measured_step is not None and cluster.card is not None:
        share = cluster.measured_step.tflops / cluster.card.bf16_tflops
        return share, share
    known = cluster.utilization
    return PUBLISHED_UTILIZATION if known is None else (known, known)


def job_gpu_hours(chain: JobChain, job: PlannedJob, family: Family) -> tuple[float, float] | None:
    """Fewest and most GPU-hours, by ``utilizations``; ``None`` where no GPU is named."""
    card = chain.cluster.card
    if card is None:
        return None
    flops, _, _ = work(chain, job, family)
    least, most = utilizations(chain.cluster)
    return gpu_hours(flops, card.bf16_tflops, most), gpu_hours(flops, card.bf16_tflops, least)


def slurm_jobs(job: PlannedJob, gpu_hours: float) -> int:
    """How many time limits a job takes, each ending where it is told to save."""
    continuation = job.recipe.slurm.continuation
    whole = job.recipe.job != "train" or isinstance(continuation, Once)
    useful = seconds(job.time) - (0 if whole else continuation.lead)
    return max(1, ceil(gpu_hours / job.ranks * 3600 / max(1, useful)))


def time_problems(chain: JobChain, job: PlannedJob, family: Family) -> Iterator[Found]:
    """A job that is over before its work is done, by the larger estimate."""
    found, continuation = job_gpu_hours(chain, job, family), job.recipe.slurm.continuation
    if found is None or (needed := slurm_jobs(job, found[1])) == 1:
        return
    minutes = ceil(found[1] / job.ranks * 60)
    estimate = f"an estimated {minutes} minutes of work take {needed} times slurm.time={job.time}"
    longer = f"set slurm.time={minutes // 60}:{minutes % 60:02}:00"
    if job.recipe.job != "train":
        yield "warning", f"{estimate}, and a {job.recipe.job} job begins anew each time; {longer}"
    elif isinstance(continuation, Once):
        yield "warning", f"{estimate}, and slurm.continuation.kind=none means one job; {longer}"
    elif isinstance(continuation, Links) and needed > continuation.links:
        text = f"{estimate}, but slurm.continuation.links={continuation.links}"
        yield "warning", f"{text}; set slurm.continuation.links={needed}"
