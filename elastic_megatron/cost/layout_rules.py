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

from ..space import ParentShape
from .parallel import size_of
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
    """Fewer ranks in a group, the largest number first."""
    return [{f"parallel.{group}": size} for size in range(size_of(setting.parallel, group) - 1, 0, -1)]


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
        more += _per_node(setting, prod(sizes))
        started = "" if nodes else f"start a multiple of {prod(sizes)} ranks"
        yield Problem(f"{ranks} is not a multiple of {shown} = {prod(sizes)}", (*more, *fewer), started)


def _per_node(setting: Setting, product: int) -> list[Change]:
    """Ranks of a node, the nearest numbers first, that make whole replicas on as many nodes."""
    now, most = setting.ranks_per_node, setting.most_per_node
    if now is None:
        return []
    legal = [n for n in range(1, (most or now) + 1) if setting.nodes * n % product == 0]
    return [{"slurm.ranks_per_node": n} for n in sorted(legal, key=lambda n: (abs(n - now), -n))]


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


def widths_of(setting: Setting, axis: str) -> tuple[int, ...]:
    """Every width that an axis may have in the family, the parent's first; empty where the model lacks it."""
    if setting.space is not None and axis in setting.space.axes:
        return setting.space.choices_of(axis)
    full = setting.shape.size(axis)
    return (full,) if full else ()


def other_widths(setting: Setting, axis: str, step: int) -> list[Change]:
    """The choices of an axis with those that are no multiple of ``step`` moved to the nearest that are."""
    if setting.space is None or setting.frozen or axis not in setting.space.axes:
        return []
    full, step = setting.shape.size(axis), lcm(step, setting.granule.get(axis, 1))
    least = setting.shape.moe_router_topk if axis == "num_moe_experts" else 1
    if full % step:
        return []
    widths = setting.space.choices_of(axis)
    moved = {w if w % step == 0 else next(iter(near(w, step, full, least)), full) for w in widths}
    return [{f"space.choices.{axis}": sorted(moved)}]


def _divisions(setting: Setting) -> Iterator[Problem]:
    """What is dealt to the ranks of a group must split evenly, in every submodel; all that does not is told at once."""
    shape = setting.shape
    for group in dict.fromkeys(SHARDED_BY.values()):
        ranks = size_of(setting.parallel, group)
        axes = [axis for axis, by in SHARDED_BY.items() if by == group]
        bad = list(_undivided(shape, ranks)) if group == "tensor" else []
        for axis in axes:
            widths = widths_of(setting, axis)
            if wrong := [w for w in widths if w % ranks]:
                bad.append(f"{axis}={wrong[0]}" + ("" if wrong[0] == widths[0] else " of a submodel"))
        if bad:
            padded = -(-shape.vocab_size // ranks) * ranks
            otherwise = f"pad the vocabulary to {padded}" if bad == [_vocabulary(shape)] else ""
            text = f"parallel.{group}={ranks} does not divide {', '.join(bad)}"
            yield Problem(text, tuple(split_less(setting, group)), otherwise)


def _vocabulary(shape: ParentShape) -> str:
    return f"vocab_size={shape.vocab_size}"


def _undivided(shape: ParentShape, tensor: int) -> Iterator[str]:
    """Sizes that no submodel changes and tensor ranks cannot share."""
    if "M" in shape.hybrid_layer_pattern and shape.mamba_num_groups % tensor:
        yield f"mamba_num_groups={shape.mamba_num_groups}"
    keys = shape.num_query_groups
    if "*" in shape.hybrid_layer_pattern and keys % tensor and tensor % keys:
        yield f"num_query_groups={keys} (nor the other way round)"
    if shape.vocab_size % tensor:
        yield _vocabulary(shape)


def _uneven_lanes(setting: Setting) -> Iterator[Problem]:
    """Ranks hold an equal share of every submodel where each has whole lanes."""
    space = setting.space
    for axis, group in SHARDED_BY.items():
        ranks = size_of(setting.parallel, group)
        if space is None or axis not in space.axes or any(w % ranks for w in space.choices_of(axis)):
            continue
        if space.lanes_of(axis) % ranks:
            yield _lanes(setting, axis, space.lanes_of(axis), group)


def split_less(setting: Setting, group: str) -> list[Change]:
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
    if setting.frozen or axis == "mamba_num_heads":  # its lanes are the SSM groups
        again = []
    return Problem(text, (*again[:3], *split_less(setting, group)))


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


RULES: Sequence[Callable[[Setting], Iterator[Problem]]] = (
    _world,
    _switches,
    _divisions,
    _uneven_lanes,
    _context,
    _pipeline,
)
