"""Memory of the fullest rank against the GPU that the cluster file names, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

from ..checkpoint.quantised_layers import why_apart
from ..cost.batch_rules import sequence_cut
from ..cost.rank_memory import Load, memory_per_rank, usable
from ..cost.remedy import problems_of, said
from ..cost.setting import Change, Setting
from ..cost.sliced_memory import Submodels
from ..recipe import JobChain, PlannedJob, Recipe
from ..recipe.training import Stage
from .family import Family, Found, own_steps
from .layout import setting_of

_GIB = 2**30


def memory_problems(chain: JobChain, job: PlannedJob, family: Family) -> Iterator[Found]:
    """At most one finding: that the fullest moment of a job does not fit, or hardly."""
    card, setting = chain.cluster.card, setting_of(chain, job, family)
    if card is None or setting is None:
        return
    where = fullest(chain, job, family)
    if where is None:
        return
    key, load = where
    memory = memory_per_rank(family.shape, setting.parallel, load)
    if memory["total"] <= usable(card.memory_gib):
        return
    over = memory["total"] > card.memory_gib * _GIB
    change = lighter(setting, load, key, usable(card.memory_gib))
    remedy = (
        said(change) if change is not None else "no setting tried would do; take more nodes or larger GPUs"
    )
    yield "error" if over else "warning", f"{_said(memory, chain, over)}; {remedy}"


def _said(memory: dict[str, int], chain: JobChain, over: bool) -> str:
    card, gpu = chain.cluster.card, chain.cluster.gpu
    assert card is not None
    name = gpu if isinstance(gpu, str) else getattr(gpu, "name", "GPU")
    parts = {part: size for part, size in memory.items() if part != "total"}
    largest = max(parts, key=lambda part: parts[part])
    limit = f"{card.memory_gib:g} GiB of {name}"
    if not over:
        limit = (
            f"{usable(card.memory_gib) / _GIB:.1f} GiB that CUDA, NCCL and fragmentation leave of the {limit}"
        )
    return (
        f"the fullest rank needs an estimated {memory['total'] / _GIB:.1f} GiB, most of it {largest} "
        f"({parts[largest] / _GIB:.1f} GiB), more than the {limit}"
    )


def loads(chain: JobChain, job: PlannedJob, family: Family) -> Iterator[tuple[str, Load]]:
    """What the job computes at a time, and the section of the recipe that says so."""
    recipe = job.recipe
    load = Load(
        0,
        0,
        recipe.model.dtype,
        recipe.job == "train",
        family.teacher,
        recipe.job == "train" and bool(recipe.budgets) and not family.frozen,
        chunk=recipe.loss.chunk,
        rounded=_rounded(family) if recipe.quantize is not None else frozenset(),
    )
    if recipe.job == "train":
        for index, _ in own_steps(chain, job):
            stage = recipe.stages[index]
            size = {"seq_length": stage.seq_length, "micro_batch_size": stage.micro_batch_size}
            yield f"stages.{index}", replace(load, sliced=_sliced(recipe, stage, family), **size)
    elif recipe.job == "rank":
        rank = recipe.rank
        # the logits before and after sorting, and those being compared
        yield (
            "rank",
            replace(load, seq_length=rank.seq_length, micro_batch_size=rank.micro_batch_size, logits=3),
        )
    if (fed := recipe.quantize) is not None and recipe.job in ("train", "quantize"):
        # likewise those of the model and of its quantised self
        size = {"seq_length": fed.seq_length, "micro_batch_size": fed.micro_batch_size}
        yield "quantize", replace(load, training=False, elastic=False, logits=3, **size)


def _sliced(recipe: Recipe, stage: Stage, family: Family) -> Submodels | None:
    """The submodels of a stage whose widths are known and computed alone."""
    if family.space is None or not family.frozen or stage.execution == "masked":
        return None
    drawn = [
        family.result.submodels[name] for name, odds in recipe.budget_probabilities(stage).items() if odds
    ]
    known = frozenset(spec for spec in drawn if spec.widths)
    quantised = family.result.quantised if recipe.quantize is not None else None
    apart = quantised and why_apart(recipe, family.shape, quantised, elastic=True, frozen=True)
    # Megatron's own linears take strides, Transformer Engine's do not
    return Submodels(family.space, known, dense=not apart)


def _rounded(family: Family) -> frozenset[tuple[int, str]]:
    quantised = family.result.quantised
    assert quantised is not None, "the result of a job that quantises"
    return frozenset((layer, layout.name) for layer, layout, _ in quantised.stored_keys(family.shape))


def fullest(chain: JobChain, job: PlannedJob, family: Family) -> tuple[str, Load] | None:
    """The load that takes most memory; ``None`` for a job that computes nothing on ranks."""
    setting = setting_of(chain, job, family)
    if setting is None:
        return None
    parallel = setting.parallel
    fits = parallel.pipeline * (parallel.virtual_pipeline or 1) <= family.shape.num_layers

    def size(load: Load) -> int:
        return memory_per_rank(family.shape, parallel, load)["total"] if fits else load.tokens

    return max(loads(chain, job, family), key=lambda each: size(each[1]), default=None)


def lighter(setting: Setting, load: Load, key: str, limit: float) -> Change | None:
    """The smallest change of settings that makes a load fit, by the same formulas; the first that does in order.

    Tried are smaller micro-batches, recomputation, more ranks a model, more nodes, these together, and last of all
    shorter sequences.
    """
    for change in (*_changes(setting, load, key), *_shorter(setting, load, key)):
        if (whole := legal(setting, change)) is None:
            continue
        changed = setting.changed(whole)
        assert changed is not None
        fed = {n: whole.get(f"{key}.{n}", getattr(load, n)) for n in ("seq_length", "micro_batch_size")}
        if memory_per_rank(changed.shape, changed.parallel, replace(load, **fed))["total"] <= limit:
            return whole
    return None


def _shorter(setting: Setting, load: Load, key: str) -> list[Change]:
    lengths, cut = [load.seq_length // 2], sequence_cut(setting.parallel)
    while lengths[-1] >= 2 * cut:
        lengths.append(lengths[-1] // 2)
    return [{f"{key}.seq_length": max(1, length // cut) * cut} for length in lengths]


def legal(setting: Setting, change: Change) -> Change | None:
    """The change, with one more where the layout then needs it; ``None`` where it does not fit all the same."""
    changed = setting.changed(change)
    problems = problems_of(changed) if changed is not None else []
    if changed is None or not problems:
        return None if changed is None else change
    for further in problems[0].changes:
        if set(further) & set(change) or any(key.startswith("space.") for key in further):
            continue
        both = {**change, **further}
        mended = setting.changed(both)
        if mended is not None and not problems_of(mended):
            return both
    return None


def _changes(setting: Setting, load: Load, key: str) -> list[Change]:
    """Combinations of one value each of what saves memory, few changes first, cheap ones before dear ones."""
    parallel, micro = setting.parallel, load.micro_batch_size
    batches = [None, *(n for n in range(micro - 1, 0, -1) if micro % n == 0)]
    recompute = [None, "full"] if load.training and not parallel.recompute else [None]
    whole = [None, True] if load.training and not parallel.distributed_optimizer else [None]
    groups: list[Change] = [{}]
    for factor in (2, 4, 8, 16, 32):
        for group in ("context", "tensor", "expert", "pipeline"):
            groups.append({f"parallel.{group}": getattr(parallel, group) * factor})
    nodes = [None, *(setting.nodes * factor for factor in (2, 4, 8, 16, 32, 64))]
    out: list[Change] = []
    for more, group, full, split, batch in product(nodes, groups, recompute, whole, batches):
        change: dict[str, Any] = {f"{key}.micro_batch_size": batch, "parallel.recompute": full}
        change |= {"parallel.distributed_optimizer": split, **group, "slurm.nodes": more}
        out.append({k: v for k, v in change.items() if v is not None})
    return sorted((c for c in out if c), key=len)
