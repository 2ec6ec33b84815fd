"""What a job's command would refuse at its start: settings that are missing, layouts that do not fit."""

from __future__ import annotations

from collections.abc import Iterator

from ..cost.remedy import described, problems_of
from ..cost.setting import Setting
from ..recipe import JobChain, PlannedJob
from ..recipe.types import did_you_mean
from .family import Family, Found, own_steps

NVFP4_BLOCK = 16


def job_problems(chain: JobChain, job: PlannedJob, family: Family) -> Iterator[Found]:
    """Findings about the numbers of one job."""
    for text in refused(job, family):
        yield "error", text
    if (setting := setting_of(job, family)) is not None:
        for problem in problems_of(setting):
            yield "error", described(setting, problem)
    yield from _long_sequences(chain, job, family)
    yield from _across_nodes(chain, job)


def setting_of(job: PlannedJob, family: Family) -> Setting | None:
    """The numbers that the rules of layouts read; ``None`` for a job that is one process."""
    recipe = job.recipe
    if recipe.job == "export":
        return None
    train, parallel = recipe.job == "train", recipe.parallel
    if not train:  # a pass over data runs whole pipeline stages
        parallel = parallel.model_copy(update={"virtual_pipeline": None})
    return Setting.of(
        family.shape,
        family.space,
        parallel,
        recipe.stages if train else (),
        calibration={"rank": recipe.rank, "quantize": recipe.quantize}.get(recipe.job),
        ranks_per_node=job.ranks_per_node,
        blocks=NVFP4_BLOCK if recipe.quantize is not None and recipe.quantize.format == "nvfp4" else 1,
        draws=train and bool(recipe.budgets),
        granule=recipe.space.granule,
    )


def refused(job: PlannedJob, family: Family) -> Iterator[str]:
    """What `rank` and `train` say themselves, before they build anything."""
    recipe = job.recipe
    if recipe.quantize is not None:
        what = "quantize jobs are" if recipe.job == "quantize" else "training with quantize is"
        remedy = "take the job out of the chain" if recipe.job == "quantize" else "set quantize=null"
        yield f"{what} not built yet; {remedy}"
    elif recipe.job == "rank":
        yield from _rank(job, family)
    elif recipe.job == "export":
        yield from _export(job, family)
    elif recipe.job == "train":
        yield from _train(job, family)


def _rank(job: PlannedJob, family: Family) -> Iterator[str]:
    recipe = job.recipe
    if not recipe.space.choices:
        yield "there are no space.choices, so there is nothing to rank; name the elastic axes"
    if "num_layers" in recipe.space.choices and not recipe.rank.depth:
        yield "num_layers is elastic, but rank.depth is false; set rank.depth=true"
    if not recipe.data.train:
        yield "there is no data.train to calibrate on; add prefixes written by prepare-data"
    if family.parent.ranking is not None:
        yield f"{recipe.model.checkpoint or recipe.model.hf} is sorted already; rank the parent it was made from"


def _train(job: PlannedJob, family: Family) -> Iterator[str]:
    recipe = job.recipe
    if not recipe.stages:
        yield "there are no stages, so there is nothing to train; add stages"
    if not recipe.data.train:
        yield "there is no data.train; add prefixes written by prepare-data"
    if recipe.model.dtype == "bf16" and not recipe.parallel.distributed_optimizer:
        yield (
            "parallel.distributed_optimizer is false, but a bf16 model cannot be saved without it; "
            "set parallel.distributed_optimizer=true"
        )
    if family.teacher is None:
        return
    if recipe.teacher.checkpoint is None and recipe.model.sizes is not None:
        yield (
            f"loss.kind {recipe.loss.kind} distils the parent, but model.sizes starts from random weights; name a "
            "teacher.checkpoint, or set loss.kind=cross_entropy"
        )
    if family.teacher.vocab_size != family.shape.vocab_size:
        yield (
            f"teacher.checkpoint has a vocabulary of {family.teacher.vocab_size}, the parent "
            f"{family.shape.vocab_size}; distillation needs one tokenizer"
        )


def _export(job: PlannedJob, family: Family) -> Iterator[str]:
    export, known = job.recipe.export, list(family.parent.submodels)
    assert export is not None
    if export.elastic is not None and not known:
        yield "export.elastic: the model has no submodels; train it with budgets first, or set export.elastic=null"
    for name in export.submodels:
        if name not in known:
            hint = (
                did_you_mean(name, known)
                or f"; there are {', '.join(known) or 'none: train with budgets first'}"
            )
            yield f"export.submodels: there will be no submodel {name!r}{hint}"


def _long_sequences(chain: JobChain, job: PlannedJob, family: Family) -> Iterator[Found]:
    recipe, most = job.recipe, family.shape.max_position_embeddings
    fed = [(f"stages.{i}", recipe.stages[i].seq_length) for i, _ in own_steps(chain, job)]
    if recipe.job == "rank":
        fed = [("rank", recipe.rank.seq_length)]
    for key, length in fed if recipe.job in ("rank", "train") else ():
        if length > most:
            yield (
                "warning",
                f"{key}.seq_length={length} is longer than max_position_embeddings={most}, which exports declare; "
                + (
                    f"set model.sizes.max_position_embeddings={length}, or "
                    if recipe.model.sizes is not None
                    else ""
                )
                + f"set {key}.seq_length={most}",
            )


def _across_nodes(chain: JobChain, job: PlannedJob) -> Iterator[Found]:
    tensor, node = job.recipe.parallel.tensor, job.ranks_per_node
    if job.recipe.job != "export" and tensor > node and chain.cluster.gpus_per_node:
        yield (
            "warning",
            f"parallel.tensor={tensor} spans nodes of {node} ranks, and every layer then waits for the network; "
            f"set parallel.tensor={max(n for n in range(1, node + 1) if tensor % n == 0)}",
        )
