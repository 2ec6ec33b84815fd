"""Rules that tie sections of a recipe together.

Each check names the sections that it reads as its parameters, so that it can still run when some other
section is broken: a user then sees every problem in one go.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping

from elastic_megatron.recipe.deploy import Export, Quantize
from elastic_megatron.recipe.elastic import Budgets, Router, Space
from elastic_megatron.recipe.model import Model
from elastic_megatron.recipe.objective import Loss, Teacher
from elastic_megatron.recipe.training import Data, Parallel, Stage
from elastic_megatron.recipe.types import Problem, did_you_mean
from elastic_megatron.space import replicas_per_draw


def _budgets_need_choices(budgets: Budgets, space: Space) -> Iterator[Problem]:
    if budgets and not space.choices:
        yield Problem(("budgets",), "needs sizes to choose from: fill in space.choices")


def _stage_names(stages: tuple[Stage, ...]) -> Iterator[Problem]:
    names = [stage.name for stage in stages]
    for index, name in enumerate(names):
        if name in names[:index]:
            text = f"{name!r} is already the name of stages[{names.index(name)}]"
            yield Problem(("stages", index, "name"), text)


def _stage_budgets(stages: tuple[Stage, ...], budgets: Budgets) -> Iterator[Problem]:
    for index, stage in enumerate(stages):
        probs = {} if isinstance(stage.budget_probs, str) else stage.budget_probs
        for name in probs:
            if name not in budgets:
                hint = did_you_mean(name, budgets) or f"; budgets are {', '.join(budgets) or '(none)'}"
                yield Problem(("stages", index, "budget_probs", name), f"unknown key {name!r}{hint}", True)


def _stop_after(stop_after: str | None, stages: tuple[Stage, ...]) -> Iterator[Problem]:
    names = [stage.name for stage in stages]
    if stop_after is not None and stop_after not in names:
        hint = did_you_mean(stop_after, names) or f"; stages are {', '.join(names) or '(none)'}"
        yield Problem(("stop_after",), f"there is no stage {stop_after!r}{hint}")


def _job_has_its_section(
    job: str, model: Model, export: Export | None, quantize: Quantize | None
) -> Iterator[Problem]:
    if job == "export" and export is None:
        yield Problem(("job",), "'export' needs a section export: what to write where")
    if job == "export" and model.checkpoint is None:
        yield Problem(("job",), "'export' needs model.checkpoint: the run to export")
    if job == "quantize" and quantize is None:
        yield Problem(("job",), "'quantize' needs a section quantize: the format")
    if job == "quantize" and model.sizes is not None:
        text = "'quantize' needs model.checkpoint or model.hf: model.sizes starts from random weights"
        yield Problem(("job",), text)


def _calibration_data(job: str, data: Data) -> Iterator[Problem]:
    if job == "quantize" and not data.train:
        yield Problem(
            ("job",), "'quantize' needs data.train to calibrate on: prefixes written by prepare-data"
        )


def _quantized_rank(job: str, quantize: Quantize | None) -> Iterator[Problem]:
    if job == "rank" and quantize is not None:
        text = (
            "has no effect on 'rank', which sorts the weights as they are; null removes an inherited section"
        )
        yield Problem(("quantize",), text)


def _frozen_router(router: Router, budgets: Budgets) -> Iterator[Problem]:
    if router.frozen and not budgets:
        yield Problem(("router", "frozen"), "needs budgets: names of submodels of model.checkpoint")


def _exported_submodels(export: Export | None, budgets: Budgets) -> Iterator[Problem]:
    for index, name in enumerate(export.submodels if export is not None and budgets else ()):
        if name not in budgets:
            hint = did_you_mean(name, budgets) or f"; budgets are {', '.join(budgets)}"
            yield Problem(("export", "submodels", index), f"there is no budget {name!r}{hint}")


def _plain_training(
    stages: tuple[Stage, ...], budgets: Budgets, loss: Loss, teacher: Teacher, quantize: Quantize | None
) -> Iterator[Problem]:
    if (
        stages
        and not budgets
        and quantize is None
        and loss.kind != "cross_entropy"
        and teacher.checkpoint is None
    ):
        text = (
            f"{loss.kind} of a model from itself is always 0: "
            "add budgets, name a teacher.checkpoint, or write kind: cross_entropy"
        )
        yield Problem(("loss", "kind"), text)


def _teacher_cache(teacher: Teacher, loss: Loss) -> Iterator[Problem]:
    if teacher.cache_only and teacher.cache is None:
        yield Problem(
            ("teacher", "cache_only"), "needs teacher.cache: the folder that has what the teacher said"
        )
    if teacher.cache is not None and loss.kind == "cross_entropy":
        text = "has no effect on loss.kind: cross_entropy, which asks no teacher; null removes an inherited folder"
        yield Problem(("teacher", "cache"), text)


def _topk(model: Model, space: Space) -> Iterator[Problem]:
    if model.sizes is None:
        return
    for index, experts in enumerate(space.choices.get("num_moe_experts", ())):
        if experts < model.sizes.moe_router_topk:
            text = f"{experts} experts are fewer than model.sizes.moe_router_topk = {model.sizes.moe_router_topk}"
            yield Problem(("space", "choices", "num_moe_experts", index), text)


def _parallel_switches(parallel: Parallel) -> Iterator[Problem]:
    if parallel.sequence and parallel.tensor == 1:
        yield Problem(("parallel", "sequence"), "needs parallel.tensor above 1")
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        yield Problem(("parallel", "virtual_pipeline"), "needs parallel.pipeline above 1")
    if parallel.shared_expert_overlap and parallel.dispatcher == "allgather":
        text = "needs parallel.dispatcher=alltoall or flex, which give it something to overlap with"
        yield Problem(("parallel", "shared_expert_overlap"), text)


def _world_size(parallel: Parallel) -> Iterator[Problem]:
    world = parallel.world_size
    dense = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    experts = {
        "expert_tensor": parallel.expert_tensor or parallel.tensor,
        "expert": parallel.expert,
        "pipeline": parallel.pipeline,
    }
    for sizes in (dense, experts):
        product = math.prod(sizes.values())
        if world is not None and world % product:
            shown = " x ".join(f"{name} {size}" for name, size in sizes.items())
            yield Problem(("parallel", "world_size"), f"{world} is not a multiple of {shown} = {product}")


def _batch_per_rank(parallel: Parallel, stages: tuple[Stage, ...]) -> Iterator[Problem]:
    replicas, rest = divmod(parallel.world_size or 0, parallel.tensor * parallel.pipeline * parallel.context)
    if not replicas or rest:
        return
    for index, stage in enumerate(stages):
        per_pass = stage.micro_batch_size * replicas
        if stage.global_batch_size % per_pass:
            text = (
                f"{stage.global_batch_size} is not a multiple of micro_batch_size {stage.micro_batch_size} "
                f"x {replicas} data-parallel ranks = {per_pass}"
            )
            yield Problem(("stages", index, "global_batch_size"), text)


def draw_problem(parallel: Parallel, stage: Stage) -> str | None:
    """What is wrong with ``samples_per_draw``, whatever the number of ranks, or nothing.

    Micro-batch m of data-parallel rank r begins at sample (m x ranks + r) x micro_batch_size of the step. Ranks
    that share experts are consecutive, and so are their samples. Those lie in one draw, in every micro-batch,
    exactly if a draw holds a multiple of what these ranks take together (or the whole step, which is such a
    multiple).
    """
    ranks = replicas_per_draw(parallel.tensor, parallel.context, parallel.expert_tensor, parallel.expert)
    size = stage.micro_batch_size
    if stage.draw_size % (size * ranks) == 0:
        return None
    return (
        f"must be a multiple of {size * ranks}, since {ranks} data-parallel ranks of micro_batch_size {size} share "
        f"experts, and with them a draw; write {size * ranks}"
    )


def _draws(parallel: Parallel, stages: tuple[Stage, ...], budgets: Budgets) -> Iterator[Problem]:
    for index, stage in enumerate(stages):
        if budgets and (text := draw_problem(parallel, stage)):
            yield Problem(("stages", index, "samples_per_draw"), text)


def _execution(
    stages: tuple[Stage, ...], budgets: Budgets, router: Router, quantize: Quantize | None
) -> Iterator[Problem]:
    frozen = router.frozen if router.frozen is not None else quantize is not None
    for index, stage in enumerate(stages):
        if stage.execution != "sliced":
            continue
        at = ("stages", index, "execution")
        if not budgets:
            yield Problem(at, "'sliced' needs budgets, whose submodels it runs")
        elif not frozen and router.sampling == "soft":
            text = "'sliced' runs one size at a time, but router.sampling: soft mixes sizes; write hard, or auto here"
            yield Problem(at, text)


def _several_budgets(stages: tuple[Stage, ...], budgets: Budgets) -> Iterator[Problem]:
    for index, stage in enumerate(stages):
        probs = stage.budget_probs
        drawn = len(budgets) if isinstance(probs, str) else sum(p > 0 for p in probs.values())
        if stage.budgets_per_batch > max(1, drawn):
            text = f"{stage.budgets_per_batch} different budgets, but {drawn} are drawn in this stage"
            yield Problem(("stages", index, "budgets_per_batch"), text)


_CHECKS: tuple[Callable[..., Iterator[Problem]], ...] = (
    _budgets_need_choices,
    _stage_names,
    _stage_budgets,
    _stop_after,
    _job_has_its_section,
    _calibration_data,
    _quantized_rank,
    _frozen_router,
    _exported_submodels,
    _plain_training,
    _teacher_cache,
    _topk,
    _parallel_switches,
    _world_size,
    _batch_per_rank,
    _draws,
    _execution,
    _several_budgets,
)


def run(sections: Mapping[str, object]) -> list[Problem]:
    """Problems between the given valid sections; a check whose sections are not all there is left out."""
    found: list[Problem] = []
    for check in _CHECKS:
        names = inspect.signature(check).parameters
        if all(name in sections for name in names):
            found += check(**{name: sections[name] for name in names})
    return found
