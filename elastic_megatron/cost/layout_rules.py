"""The rules of a parallel layout: what Megatron would refuse, or get wrong, once the job runs.

They are those of megatron-core 0.19: ``TransformerConfig``, ``MambaMixer``, ``MambaContextParallel``, ``MoELayer``,
``VocabParallelEmbedding``, ``initialize_model_parallel``, the interleaved schedule. Pipelines may be uneven, which
Megatron's own split is not (``space.stage_layers``). Widths are checked for every choice of the space, since each
submodel is built or run under this layout, and lanes so that every rank holds an equal share of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import lcm, prod

from .parallel import Layout, replicas_per_draw, size_of
from .setting import Change, Setting

# axis -> the group over which its components are dealt to ranks
SHARDED_BY = {
    "ffn_hidden_size": "tensor",
    "moe_ffn_hidden_size": "expert_tensor",
    "moe_shared_expert_intermediate_size": "tensor",
    "num_moe_experts": "expert",
    "mamba_num_heads": "tensor",
    "num_attention_heads": "tensor",
}


@dataclass(frozen=True)
class Problem:
    """What does not fit, in words, and the changes that may mend it, the likeliest first.

    ``otherwise`` is a remedy that is no number of the recipe.
    """

    text: str
    changes: tuple[Change, ...]
    otherwise: str = ""


def near(value: int, step: int, most: int | None = None, least: int = 1) -> list[int]:
    """Multiples of ``step`` around a value, the nearest first; within ``least`` .. ``most``."""
    below = value // step * step
    around = [below + i * step for i in range(-2, 4)]
    legal = [n for n in around if n >= least and n != value and (most is None or n <= most)]
    return sorted(legal, key=lambda n: (abs(n - value), -n))


def lower(setting: Setting, group: str) -> list[Change]:
    """Fewer ranks in a group, the largest number first; whatever stands or falls with it goes along."""
    changes: list[Change] = []
    for size in range(size_of(setting.parallel, group) - 1, 0, -1):
        change: dict[str, object] = {f"parallel.{group}": size}
        if group == "tensor" and size == 1 and setting.parallel.sequence:
            change["parallel.sequence"] = False
        if group == "pipeline" and size == 1 and setting.parallel.virtual_pipeline:
            change["parallel.virtual_pipeline"] = None
        changes.append(change)
    return changes


def _world(setting: Setting) -> Iterator[Problem]:
    world = setting.parallel.world_size
    for groups in (("tensor", "pipeline", "context"), ("expert_tensor", "expert", "pipeline")):
        sizes = [size_of(setting.parallel, g) for g in groups]
        if world is None or world % prod(sizes) == 0:
            continue
        shown = " x ".join(f"{g} {n}" for g, n in zip(groups, sizes, strict=True))
        nodes = setting.ranks_per_node
        ranks = (
            f"{world // nodes} nodes x {nodes} ranks = {world}" if nodes else f"parallel.world_size={world}"
        )
        fewer = [c for g in groups for c in lower(setting, g) if g != "expert_tensor"]
        more = [setting.nodes_or_ranks(n) for n in near(world, lcm(prod(sizes), nodes or 1))]
        yield Problem(f"{ranks} is not a multiple of {shown} = {prod(sizes)}", (*more, *fewer))


def _switches(setting: Setting) -> Iterator[Problem]:
    parallel, moe = setting.parallel, "E" in setting.shape.hybrid_layer_pattern
    if parallel.sequence and parallel.tensor == 1:
        text = "parallel.sequence=true needs parallel.tensor above 1"
        yield Problem(text, ({"parallel.sequence": False},))
    if moe and parallel.tensor > 1 and not parallel.sequence:
        text = f"parallel.tensor={parallel.tensor} with MoE layers needs sequence parallelism, as Megatron insists"
        yield Problem(text, ({"parallel.sequence": True}, {"parallel.tensor": 1}))
    if parallel.expert > 1 and not moe:
        text = f"parallel.expert={parallel.expert}, but the model has no MoE layers"
        yield Problem(text, ({"parallel.expert": 1},))


def _groups(setting: Setting) -> Iterator[Problem]:
    """Sizes that no submodel changes: SSM groups, KV groups and the vocabulary."""
    shape, tensor = setting.shape, setting.parallel.tensor
    groups, keys, fewer = shape.mamba_num_groups, shape.num_query_groups, tuple(lower(setting, "tensor"))
    if "M" in shape.hybrid_layer_pattern and groups % tensor:
        yield Problem(
            f"parallel.tensor={tensor} does not divide mamba_num_groups={groups}, which is not split", fewer
        )
    if "*" in shape.hybrid_layer_pattern and keys % tensor and tensor % keys:
        text = f"parallel.tensor={tensor} is neither a divisor nor a multiple of num_query_groups={keys}"
        yield Problem(text, fewer)
    if shape.vocab_size % tensor:
        padded = -(-shape.vocab_size // tensor) * tensor
        text = f"parallel.tensor={tensor} does not divide vocab_size={shape.vocab_size}"
        yield Problem(text, fewer, f"pad the vocabulary to {padded}")


def widths_of(setting: Setting, axis: str) -> tuple[int, ...]:
    """Every width that an axis may have in the family, the parent's first; empty where the model lacks it."""
    if setting.space is not None and axis in setting.space.axes:
        return setting.space.choices_of(axis)
    full = setting.shape.size(axis)
    return (full,) if full else ()


def other_widths(setting: Setting, axis: str, step: int) -> list[Change]:
    """The choices of an axis with those that are no multiple of ``step`` moved to the nearest that are."""
    if setting.space is None or axis not in setting.space.axes:
        return []
    full, step = (
        setting.shape.size(axis),
        lcm(step, setting.space.lanes_of(axis), setting.granule.get(axis, 1)),
    )
    least = setting.shape.moe_router_topk if axis == "num_moe_experts" else 1
    if full % step:
        return []
    widths = setting.space.choices_of(axis)
    moved = {w if w % step == 0 else next(iter(near(w, step, full, least)), full) for w in widths}
    return [{f"space.choices.{axis}": sorted(moved)}]


def _widths(setting: Setting) -> Iterator[Problem]:
    """Every width of every submodel must split evenly, and by whole lanes where the axis is elastic."""
    space = setting.space
    for axis, group in SHARDED_BY.items():
        ranks, widths = size_of(setting.parallel, group), widths_of(setting, axis)
        if not widths or ranks == 1:
            continue
        if bad := [w for w in widths if w % ranks]:
            whose = "" if bad[0] == widths[0] else " of a submodel"
            text = f"parallel.{group}={ranks} does not divide {axis}={bad[0]}{whose}"
            yield Problem(text, (*other_widths(setting, axis, ranks), *_fewer(setting, group)))
        elif space is not None and axis in space.axes and space.lanes_of(axis) % ranks:
            yield _lanes(setting, axis, space.lanes_of(axis), group)


def _fewer(setting: Setting, group: str) -> list[Change]:
    """As ``lower``; experts that are split as everything else is may also be split on their own."""
    if group == "expert_tensor" and setting.parallel.expert_tensor is None:
        return lower(setting, group) + lower(setting, "tensor")
    return lower(setting, group)


def _lanes(setting: Setting, axis: str, lanes: int, group: str) -> Problem:
    ranks, full = size_of(setting.parallel, group), setting.shape.size(axis)
    text = (
        f"space.lanes.{axis}={lanes} is not a multiple of parallel.{group}={ranks}, so a submodel's share would differ "
        "from rank to rank"
    )
    step = lcm(ranks, setting.shape.groups(axis))
    again = [{f"space.lanes.{axis}": n} for n in range(step, full + 1, step) if full % n == 0]
    if axis == "mamba_num_heads":  # its lanes are the SSM groups
        again = []
    return Problem(text, (*again[:3], *_fewer(setting, group)))


def _context(setting: Setting) -> Iterator[Problem]:
    """Context parallelism splits a tensor rank's Mamba heads, and its SSM groups or the heads of each."""
    tensor, context, groups = (
        setting.parallel.tensor,
        setting.parallel.context,
        setting.shape.mamba_num_groups,
    )
    if context == 1 or "M" not in setting.shape.hybrid_layer_pattern or groups % tensor:
        return
    fewer = tuple(lower(setting, "context"))
    if bad := [w for w in widths_of(setting, "mamba_num_heads") if w % (tensor * context)]:
        text = f"parallel.tensor x parallel.context = {tensor * context} does not divide mamba_num_heads={bad[0]}"
        yield Problem(text, (*fewer, *other_widths(setting, "mamba_num_heads", tensor * context)))
    local = groups // tensor
    if local % context and context % local:
        text = (
            f"parallel.context={context} is neither a divisor nor a multiple of the {local} SSM groups of a tensor "
            "rank (mamba_num_groups / parallel.tensor)"
        )
        yield Problem(text, fewer)


def _pipeline(setting: Setting) -> Iterator[Problem]:
    layers, stages = setting.shape.num_layers, setting.parallel.pipeline
    chunks = setting.parallel.virtual_pipeline
    fewer: tuple[Change, ...] = tuple(lower(setting, "pipeline"))
    if chunks is not None and stages == 1:
        yield Problem(
            "parallel.virtual_pipeline needs parallel.pipeline above 1",
            ({"parallel.virtual_pipeline": None},),
        )
    elif (parts := stages * (chunks or 1)) > layers:
        if chunks:
            most = layers // stages
            fewer = ({"parallel.virtual_pipeline": most if most > 1 else None}, *fewer)
        what = f"parallel.pipeline={stages}" + (f" x virtual_pipeline={chunks} = {parts}" if chunks else "")
        yield Problem(f"{what} is more than the {layers} layers", fewer)


def sequence_cut(parallel: Layout) -> int:
    """Parts of a sequence: 2 x context (for balanced causal masks), then one a tensor rank."""
    context = parallel.context
    return lcm(2 * context if context > 1 else 1, context * parallel.tensor if parallel.sequence else 1)


def _sequences(setting: Setting) -> Iterator[Problem]:
    cut = sequence_cut(setting.parallel)
    fed = [(f"stage {s.name}", f"stages.{i}", s.seq_length) for i, s in enumerate(setting.stages)]
    if setting.calibration is not None:
        fed.append(("rank", "rank", setting.calibration.seq_length))
    for what, key, length in fed:
        if length % cut:
            text = (
                f"{what}: seq_length={length} is not a multiple of {cut}, which context and sequence parallelism "
                "cut it into"
            )
            longer: list[Change] = [{f"{key}.seq_length": n} for n in near(length, cut)]
            yield Problem(text, (*longer, *lower(setting, "context")))


def replicas(setting: Setting) -> int:
    """Model replicas that the ranks are divided into; 0 where they cannot be."""
    parallel = setting.parallel
    whole, rest = divmod(parallel.world_size or 0, parallel.tensor * parallel.pipeline * parallel.context)
    return 0 if rest else whole


def _batches(setting: Setting) -> Iterator[Problem]:
    number, parallel = replicas(setting), setting.parallel
    for index, stage in enumerate(setting.stages if number else ()):
        per_pass, batch, key = stage.micro_batch_size * number, stage.global_batch_size, f"stages.{index}."
        count, left = divmod(batch, per_pass)
        if left:
            text = (
                f"stage {stage.name}: global_batch_size={batch} is not a multiple of micro_batch_size "
                f"{stage.micro_batch_size} x {number} data-parallel ranks"
            )
            step = lcm(per_pass, stage.draw_size)
            sizes: list[Change] = [{f"{key}global_batch_size": n} for n in near(batch, step)]
            yield Problem(text, (*sizes, *_smaller(setting, key, stage.micro_batch_size)))
        elif parallel.virtual_pipeline is not None and count % parallel.pipeline:
            text = (
                f"stage {stage.name}: {count} micro-batches a step are not a multiple of parallel.pipeline="
                f"{parallel.pipeline}, as virtual_pipeline needs"
            )
            step = lcm(per_pass * parallel.pipeline, stage.draw_size)
            sizes = [{f"{key}global_batch_size": n} for n in near(batch, step)]
            yield Problem(text, (*sizes, {"parallel.virtual_pipeline": None}))


def _smaller(setting: Setting, prefix: str, micro_batch: int) -> list[Change]:
    return [{f"{prefix}micro_batch_size": n} for n in range(micro_batch - 1, 0, -1) if micro_batch % n == 0]


def _draws(setting: Setting) -> Iterator[Problem]:
    """Ranks that share experts train one submodel at a time (``recipe.checks.draw_problem`` says why)."""
    together = replicas_per_draw(setting.parallel)
    for index, stage in enumerate(setting.stages if setting.draws else ()):
        if stage.draw_size % (stage.micro_batch_size * together):
            text = (
                f"stage {stage.name}: {stage.draw_size} sequences share a draw of widths, but {together} data-parallel "
                f"ranks of micro_batch_size {stage.micro_batch_size} share experts"
            )
            yield Problem(text, ({f"stages.{index}.samples_per_draw": stage.micro_batch_size * together},))


def _calibration(setting: Setting) -> Iterator[Problem]:
    number, rank = replicas(setting), setting.calibration
    if rank is None or number < 2 or rank.samples % (rank.micro_batch_size * number) == 0:
        return
    step = rank.micro_batch_size * number
    text = (
        f"rank: samples={rank.samples} is not a multiple of micro_batch_size {rank.micro_batch_size} x {number} "
        "data-parallel ranks"
    )
    samples: list[Change] = [{"rank.samples": n} for n in near(rank.samples, step)]
    yield Problem(text, (*samples, *_smaller(setting, "rank.", rank.micro_batch_size)))


RULES: Sequence[Callable[[Setting], Iterator[Problem]]] = (
    _world,
    _switches,
    _groups,
    _widths,
    _context,
    _pipeline,
    _sequences,
    _batches,
    _draws,
    _calibration,
)
