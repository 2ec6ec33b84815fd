"""Does a parallel layout fit a model and all its submodels? Answered before a job waits in a queue for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm

from ..space import ElasticSpace, ParentShape
from .parallel import Batch, Layout, size_of
from .rank_memory import memory_per_rank

__all__ = ["SHARDED_BY", "check_layout", "check_sequence", "memory_per_rank"]


# axis -> the group over which its components are dealt to ranks
SHARDED_BY = {
    "ffn_hidden_size": "tensor",
    "moe_ffn_hidden_size": "expert_tensor",
    "moe_shared_expert_intermediate_size": "tensor",
    "num_moe_experts": "expert",
    "mamba_num_heads": "tensor",
    "num_attention_heads": "tensor",
}


def check_layout(
    shape: ParentShape, space: ElasticSpace | None, parallel: Layout, stages: Sequence[Batch] = ()
) -> list[str]:
    """Everything that Megatron would refuse, or get wrong, once the job runs; a sentence and a remedy each.

    Widths are checked for every choice of ``space``, since each submodel is built or run under this layout,
    and lanes so that every rank holds an equal share of each. Empty where the layout fits. Rules are those of
    megatron-core 0.19: ``TransformerConfig``, ``MambaMixer``, ``MambaContextParallel``, ``MoELayer``,
    ``VocabParallelEmbedding``, ``initialize_model_parallel``, the interleaved schedule. Pipelines may be uneven,
    which Megatron's own split is not (``space.stage_layers``).
    """
    return [
        *_world(parallel),
        *_switches(shape, parallel),
        *_groups(shape, parallel),
        *_widths(shape, space, parallel),
        *_context(shape, space, parallel),
        *_pipeline(shape, parallel),
        *_batches(parallel, stages),
    ]


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def _world(parallel: Layout) -> Iterator[str]:
    world = parallel.world_size
    for groups in (("tensor", "pipeline", "context"), ("expert_tensor", "expert", "pipeline")):
        sizes = [size_of(parallel, g) for g in groups]
        product = sizes[0] * sizes[1] * sizes[2]
        if world is not None and world % product:
            shown = " x ".join(f"{g} {n}" for g, n in zip(groups, sizes, strict=True))
            yield (
                f"parallel.world_size={world} is not a multiple of {shown} = {product}; start a multiple of "
                f"{product} ranks or lower one of them"
            )


def _switches(shape: ParentShape, parallel: Layout) -> Iterator[str]:
    moe = "E" in shape.hybrid_layer_pattern
    if parallel.sequence and parallel.tensor == 1:
        yield "parallel.sequence=true needs parallel.tensor above 1; remove it"
    if moe and parallel.tensor > 1 and not parallel.sequence:
        yield (
            f"parallel.tensor={parallel.tensor} with MoE layers needs sequence parallelism, which Megatron "
            "insists on; set parallel.sequence=true"
        )
    if parallel.expert > 1 and not moe:
        yield f"parallel.expert={parallel.expert}, but the model has no MoE layers; set parallel.expert=1"


def _groups(shape: ParentShape, parallel: Layout) -> Iterator[str]:
    """Sizes that no submodel changes: SSM groups, KV groups and the vocabulary."""
    tensor, groups, keys = parallel.tensor, shape.mamba_num_groups, shape.num_query_groups
    if "M" in shape.hybrid_layer_pattern and groups % tensor:
        yield (
            f"parallel.tensor={tensor} does not divide mamba_num_groups={groups}, which is not split"
            f"; choose parallel.tensor from {_divisors(groups)}"
        )
    if "*" in shape.hybrid_layer_pattern and keys % tensor and tensor % keys:
        yield (
            f"parallel.tensor={tensor} is neither a divisor nor a multiple of num_query_groups={keys}; "
            f"choose parallel.tensor from {_divisors(keys)} or multiples of {keys}"
        )
    if shape.vocab_size % tensor:
        padded = -(-shape.vocab_size // tensor) * tensor
        yield (
            f"parallel.tensor={tensor} does not divide vocab_size={shape.vocab_size}; lower parallel.tensor, "
            f"or pad the vocabulary to {padded}"
        )


def _widths(shape: ParentShape, space: ElasticSpace | None, parallel: Layout) -> Iterator[str]:
    """Every width of every submodel must split evenly, and by whole lanes where the axis is elastic."""
    for name, group in SHARDED_BY.items():
        ranks, full = size_of(parallel, group), shape.size(name)
        if not full or ranks == 1:
            continue
        elastic = space is not None and name in space.axes
        widths = space.choices_of(name) if space is not None and elastic else (full,)
        if bad := [w for w in widths if w % ranks]:
            where = f"choose multiples of {ranks} in space.choices.{name}, or " if full % ranks == 0 else ""
            whose = "" if bad[0] == full else " of a submodel"
            what = f"parallel.{group}={ranks} does not divide {name}={bad[0]}{whose}"
            yield f"{what}; {where}lower parallel.{group}"
        elif space is not None and elastic and (lanes := space.lanes_of(name)) % ranks:
            yield _lanes(shape, name, lanes, group, ranks)


def _lanes(shape: ParentShape, name: str, lanes: int, group: str, ranks: int) -> str:
    what = (
        f"space.lanes.{name}={lanes} is not a multiple of parallel.{group}={ranks}, so a submodel's share "
        "would differ from rank to rank"
    )
    if name == "mamba_num_heads":
        return f"{what}; lanes are the SSM groups here: choose parallel.{group} from {_divisors(lanes)}"
    step = lcm(ranks, shape.groups(name))
    legal = [n for n in range(step, shape.size(name) + 1, step) if shape.size(name) % n == 0]
    if not legal:
        return f"{what}; lower parallel.{group}"
    return f"{what}; rank again with space.lanes.{name}={legal[0]}, or lower parallel.{group}"


def _context(shape: ParentShape, space: ElasticSpace | None, parallel: Layout) -> Iterator[str]:
    """Context parallelism splits a tensor rank's Mamba heads, and its SSM groups or the heads of each."""
    tensor, context, groups = parallel.tensor, parallel.context, shape.mamba_num_groups
    if context == 1 or "M" not in shape.hybrid_layer_pattern or groups % tensor:
        return
    elastic = space is not None and "mamba_num_heads" in space.axes
    widths = (
        space.choices_of("mamba_num_heads") if space is not None and elastic else (shape.mamba_num_heads,)
    )
    if bad := [w for w in widths if w % (tensor * context)]:
        yield (
            f"parallel.tensor x parallel.context = {tensor * context} does not divide "
            f"mamba_num_heads={bad[0]}; lower parallel.context"
        )
    local = groups // tensor
    if local % context and context % local:
        yield (
            f"parallel.context={context} is neither a divisor nor a multiple of the {local} SSM groups of a "
            f"tensor rank (mamba_num_groups / parallel.tensor); choose parallel.context from "
            f"{_divisors(local)} or multiples of {local}"
        )


def _pipeline(shape: ParentShape, parallel: Layout) -> Iterator[str]:
    layers, stages, chunks = shape.num_layers, parallel.pipeline, parallel.virtual_pipeline
    if chunks is not None and stages == 1:
        yield "parallel.virtual_pipeline needs parallel.pipeline above 1; remove it"
    elif (parts := stages * (chunks or 1)) > layers:
        what = f"parallel.pipeline={stages}" + (f" x virtual_pipeline={chunks}" if chunks else "")
        product = f" = {parts}" if chunks else ""
        yield f"{what}{product} is more than the {layers} layers; lower it to {layers} or less"


def _batches(parallel: Layout, stages: Sequence[Batch]) -> Iterator[str]:
    for stage in stages:
        yield from check_sequence(parallel, f"stage {stage.name}", stage.seq_length)
        yield from _micro_batches(parallel, stage)


def check_sequence(parallel: Layout, what: str, seq_length: int) -> Iterator[str]:
    """Sequences are cut 2 x context ways (for balanced causal masks), then over tensor ranks."""
    context = parallel.context
    cut = lcm(2 * context if context > 1 else 1, context * parallel.tensor if parallel.sequence else 1)
    if seq_length % cut:
        yield (
            f"{what}: seq_length={seq_length} is not a multiple of {cut}, which context and sequence parallelism "
            "cut it into; choose a multiple"
        )


def _micro_batches(parallel: Layout, stage: Batch) -> Iterator[str]:
    replicas, rest = divmod(parallel.world_size or 0, parallel.tensor * parallel.pipeline * parallel.context)
    if not replicas or rest:
        return
    per_pass = stage.micro_batch_size * replicas
    count, left = divmod(stage.global_batch_size, per_pass)
    if left:
        yield (
            f"stage {stage.name}: global_batch_size={stage.global_batch_size} is not a multiple of "
            f"micro_batch_size {stage.micro_batch_size} x {replicas} data-parallel ranks; choose a "
            f"multiple of {per_pass}"
        )
    elif parallel.virtual_pipeline is not None and count % parallel.pipeline:
        yield (
            f"stage {stage.name}: {count} micro-batches a step are not a multiple of parallel.pipeline="
            f"{parallel.pipeline}, as virtual_pipeline needs; choose global_batch_size as a multiple of "
            f"{per_pass * parallel.pipeline}"
        )
