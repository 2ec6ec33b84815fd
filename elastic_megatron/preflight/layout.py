"""What a job's command would refuse at its start: settings that are missing, layouts that do not fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from ..checkpoint.hf_quantised import Quantised, read_quantised
from ..checkpoint.quantised_layers import checked_of, in_use
from ..checkpoint.resolve import CONFIG
from ..cost.kernel_rules import slow_attention
from ..cost.layout_rules import Problem, lower
from ..cost.remedy import described, problems_of
from ..cost.setting import Setting
from ..errors import UserError
from ..files.json_files import read_object
from ..recipe import JobChain, PlannedJob
from ..space import ElasticSpace
from .family import Family, Found, own_steps


def job_problems(chain: JobChain, job: PlannedJob, family: Family) -> Iterator[Found]:
    """Findings about the numbers of one job."""
    for text in refused(job, family):
        yield "error", text
    if (setting := setting_of(chain, job, family)) is not None:
        for problem in (*limits(setting), *problems_of(setting)):
            yield "error", described(setting, problem)
        if chain.cluster.gpus_per_node:
            for problem in (*across_nodes(setting), *slow_attention(setting)):
                yield "warning", described(setting, problem)
    yield from _long_sequences(chain, job, family)


def setting_of(chain: JobChain, job: PlannedJob, family: Family) -> Setting | None:
    """The numbers that the rules of layouts read; ``None`` for a job that is one process."""
    recipe = job.recipe
    if recipe.job == "export":
        return None
    train, parallel = recipe.job == "train", recipe.parallel
    if not train:  # a pass over data runs whole pipeline stages
        parallel = parallel.model_copy(update={"virtual_pipeline": None})
    rest = checked_of(recipe, family.shape, frozen=family.frozen)
    return Setting.of(
        family.shape,
        _widths(family),
        parallel,
        recipe.stages if train else (),
        ranks_per_node=job.ranks_per_node,
        most_per_node=chain.cluster.gpus_per_node or None,
        most_nodes=chain.cluster.max_nodes,
        draws=train and bool(recipe.budgets),
        gpus=bool(chain.cluster.gpus_per_node),
        granule=recipe.space.granule,
        **({"calibration": recipe.rank} if recipe.job == "rank" else rest),
    )


def _widths(family: Family) -> ElasticSpace | None:
    """The widths that submodels have or may get."""
    specs = family.result.submodels.values()
    if family.space is None or not family.frozen or not all(spec.widths for spec in specs):
        return family.space
    return in_use(family.space, specs)


def refused(job: PlannedJob, family: Family) -> Iterator[str]:
    """What the commands say themselves, before they build anything."""
    recipe = job.recipe
    if recipe.job == "rank":
        yield from _rank(job, family)
    elif recipe.job == "export":
        yield from _export(job, family)
    elif recipe.job == "train":
        yield from _train(job, family)
    if recipe.job in ("train", "quantize"):
        yield from _submodels(job, family)
        yield from _teacher(job, family)
        yield from _quantize(job, family)


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


def _teacher(job: PlannedJob, family: Family) -> Iterator[str]:
    recipe = job.recipe
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


def _submodels(job: PlannedJob, family: Family) -> Iterator[str]:
    """Quantising, and training under a frozen router, take submodels whose widths are chosen."""
    recipe, known = job.recipe, list(family.parent.submodels)
    missing = [name for name in recipe.budgets if name not in known]
    if not missing or not (family.frozen or recipe.quantize is not None):
        return
    if recipe.quantize is not None and recipe.model.sizes is not None:
        return  # a finding of its own
    remedy = "name the run of a trained family in model.checkpoint"
    if recipe.quantize is None:
        remedy += ", or set router.frozen=false"
    elif known and recipe.job == "quantize":
        remedy += ", or set budgets=null"
    yield (
        f"budgets.{missing[0]}: the model has no submodel of this name, only "
        f"{', '.join(known) or 'the whole'}; {remedy}"
    )


def _quantize(job: PlannedJob, family: Family) -> Iterator[str]:
    model, already = job.recipe.model, family.parent.quantised
    if job.recipe.quantize is None:
        return
    if model.sizes is not None:
        yield (
            "quantize has no weights to start from: model.sizes starts from random ones; name a model.checkpoint, or "
            "set quantize=null"
        )
    if already is None and model.hf is not None:
        already = _of_directory(model.hf)
    if already is not None:
        yield (
            f"{model.checkpoint or model.hf} is quantised already, to {already.format.algo}; start from the model that "
            "it was made from"
        )


def _of_directory(path: Path) -> Quantised | None:
    folder = path.parent if path.name == CONFIG else path
    try:
        return read_quantised(folder, read_object(folder / CONFIG, ""))
    except UserError:
        return None  # a finding of its own, or yet to be written


def _export(job: PlannedJob, family: Family) -> Iterator[str]:
    export, known = job.recipe.export, list(family.parent.submodels)
    assert export is not None
    if export.elastic is not None and not known:
        yield "export.elastic: the model has no submodels; train it with budgets first, or set export.elastic=null"
    if unknown := [name for name in export.submodels if name not in known]:
        near = [difflib.get_close_matches(name, known, n=1) for name in export.submodels]
        meant = list(dict.fromkeys(name for match in near for name in match)) or known
        remedy = f"set export.submodels=[{','.join(meant)}]" if known else "train it with budgets first"
        named = ", ".join(known) or "none at all"
        yield f"export.submodels: there will be no {', '.join(unknown)}, but {named}; {remedy}"


def _long_sequences(chain: JobChain, job: PlannedJob, family: Family) -> Iterator[Found]:
    recipe, most = job.recipe, family.shape.max_position_embeddings
    fed = [(f"stages.{i}", recipe.stages[i].seq_length) for i, _ in own_steps(chain, job)]
    if recipe.job == "rank":
        fed = [("rank", recipe.rank.seq_length)]
    if recipe.quantize is not None:
        fed = [*fed, ("quantize", recipe.quantize.seq_length)]
    for key, length in fed if recipe.job != "export" else ():
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


def limits(setting: Setting) -> Iterator[Problem]:
    """More nodes, or ranks on a node, than the cluster has."""
    nodes, node, most = setting.nodes, setting.ranks_per_node or 1, setting.most_nodes
    if most is not None and nodes > most:
        text = f"slurm.nodes={nodes} is more than the cluster's max_nodes={most}"
        yield Problem(text, tuple({"slurm.nodes": n} for n in range(most, 0, -1)))
    most = setting.most_per_node
    if most is not None and node > most:
        text = f"slurm.ranks_per_node={node} is more than the cluster's gpus_per_node={most}"
        yield Problem(text, tuple({"slurm.ranks_per_node": n} for n in range(most, 0, -1)))


def across_nodes(setting: Setting) -> Iterator[Problem]:
    """Tensor parallelism over the network, which every layer would wait for."""
    tensor, node = setting.parallel.tensor, setting.ranks_per_node or 1
    if tensor > node:
        text = f"parallel.tensor={tensor} spans nodes of {node} ranks, and every layer waits for the network"
        yield Problem(text, tuple(c for c in lower(setting, "tensor") if c["parallel.tensor"] <= node))
