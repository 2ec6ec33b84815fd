"""Memory of one rank in training: an estimate by formula, to choose a layout with; not a measurement.

With n tokens of a micro-batch on a rank (sequence / context), n' = n / tensor where sequence parallelism is
on and n otherwise, T tensor ranks, X expert-tensor ranks, the tensors that a layer keeps
for its backward pass hold, in numbers:

- every layer: 2 n' hidden (input and its norm);
- ``M``: n/T (2 inner + 2 groups state + heads) (projection), n/T (inner + 2 groups state) (convolution),
  2 n/T inner (scan, gated norm);
- ``*``: n/T (2 queries + 2 keys) channels (q, k, v and the mix); scores are not kept (flash attention);
- ``-``: 2 n/T ffn;
- ``E``: 2 n/T shared, n' experts fp32 scores, and for n' topk X dispatched tokens, evenly routed,
  2 hidden (before and after the experts) + 2 moe_ffn / X;
- a stage behind another: n' hidden of the teacher for each of its chunks, received beside the student's;
- in an elastic model, whose masks are multiplied in and learn: n' hidden, what a layer wrote before it was masked, and
  of ``M`` n/T inner, the gated norm's; other products are made again for the backward pass.

Rounding to FP8 or NVFP4 makes a copy of each quantised weight, which its linear keeps for its backward pass as it keeps
what it was multiplied with, and works on the largest of them in fp32. What ``E`` hands to several experts, and to the
shared one, is kept rounded besides: n' (topk X + 1) hidden.

The way of counting is that of arXiv 2205.05198. Left out: communication buffers, fragmentation (``usable`` allows for
both) and the budget router (thousands of parameters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from ..space import ParentShape, ends, stage_layers, tensors_of
from .loss_memory import loss_bytes
from .parallel import Layout, size_of, smallest_world
from .setting import LayoutSizes, sizes_of
from .sizes import parent_fields
from .sliced_memory import Submodels

_BYTES = {"fp32": 4, "bf16": 2}
_REPLICATED = ("norm.", "input_layernorm.", "pre_mlp_layernorm.", "mlp.router.")
# What no formula above counts: CUDA and NCCL keep buffers of about two GiB, and the allocator's holes are a share.
_RESERVED, _HOLES = 2 * 2**30, 0.1


@dataclass(frozen=True)
class Load:
    """What a rank computes at a time.

    Args:
        dtype: ``fp32`` or ``bf16``.
        training: without it nothing is kept for a backward pass.
        teacher: the frozen model beside it.
        elastic: do masks act on the activations?
        chunk: tokens whose logits exist at a time in training; ``None`` for as many as ``chunk_of`` says.
        logits: of how many micro-batches they are held, outside of training.
        rounded: the weights that are rounded to a lower precision, by layer and name of the layout.
        sliced: what micro-batches run on its own widths, where that is known.
    """

    seq_length: int
    micro_batch_size: int
    dtype: str = "bf16"
    training: bool = True
    teacher: ParentShape | None = None
    elastic: bool = False
    logits: int = 1
    chunk: int | None = None
    rounded: frozenset[tuple[int, str]] = frozenset()
    sliced: Submodels | None = None

    @property
    def tokens(self) -> int:
        return self.seq_length * self.micro_batch_size

    @property
    def size(self) -> int:
        return _BYTES[self.dtype]


def usable(memory_gib: float) -> float:
    """Bytes of a card that an estimate may fill."""
    return memory_gib * 2**30 * (1 - _HOLES) - _RESERVED


def memory_per_rank(shape: ParentShape, parallel: Layout, load: Load) -> dict[str, int]:
    """Bytes on the fullest rank: ``weights, gradients, optimizer, teacher, rounded, activations, logits,
    total``.

    A parameter costs its weight (bf16 2, fp32 4), in training an fp32 gradient (4) and Adam (bf16: fp32 copy
    and two moments, 12; fp32: two moments, 8), which ``distributed_optimizer`` splits over data-parallel ranks
    (of the smallest job, without ``world_size``). Among the weights are those that ``sliced`` submodels copy. The
    teacher is a second set of frozen weights. Rounded weights and activations are those of the micro-batches in flight
    (module docstring); with ``recompute``, of one layer, and a layer's input of each. ``logits`` is what the loss takes
    (``loss_bytes``); outside of training, whole logits.
    """
    sizes = sizes_of(parallel)
    stages = [_stage(shape, sizes, stage, load) for stage in range(parallel.pipeline)]
    return max(stages, key=lambda s: s["total"])


def _stage(shape: ParentShape, parallel: LayoutSizes, stage: int, load: Load) -> dict[str, int]:
    dense, routed = params_per_rank(shape, parallel, stage)
    replicas = _replicas(parallel) if parallel.distributed_optimizer else (1.0, 1.0)
    out: dict[str, float] = {
        "weights": load.size * (dense + routed),
        "gradients": 0,
        "optimizer": 0,
        "teacher": 0,
    }
    if load.sliced is not None:
        layers = chain.from_iterable(_chunks(shape, parallel, stage))
        out["weights"] += load.size * load.sliced.copied(parallel, layers)
    if load.training:
        adam = 12 if load.dtype == "bf16" else 8
        out["gradients"] = 4 * (dense + routed)
        out["optimizer"] = adam * (dense / replicas[0] + routed / replicas[1])
    if load.teacher is not None:
        out["teacher"] = load.size * sum(params_per_rank(load.teacher, parallel, stage))
    out["rounded"] = _rounded(shape, parallel, stage, load)
    out["activations"] = _activations(shape, parallel, stage, load)
    out["logits"] = _logits(shape, parallel, load) if stage == parallel.pipeline - 1 else 0
    rounded = {k: round(v) for k, v in out.items()}
    return rounded | {"total": sum(rounded.values())}


def _replicas(parallel: Layout) -> tuple[float, float]:
    """Ranks that hold the same dense parameters, and the same expert parameters."""
    world = parallel.world_size or smallest_world(parallel)
    dense = world / (parallel.tensor * parallel.pipeline)
    experts = world / (size_of(parallel, "expert_tensor") * parallel.expert * parallel.pipeline)
    return dense, experts


def chunks_of_stage(shape: ParentShape, parallel: Layout, stage: int) -> list[str]:
    """Layer symbols of each chunk of a pipeline stage; one chunk unless the pipeline is interleaved.

    Raises ``ValueError`` if there are more chunks than layers.
    """
    pattern = shape.hybrid_layer_pattern
    return [pattern[part.start : part.stop] for part in _chunks(shape, parallel, stage)]


def _chunks(shape: ParentShape, parallel: Layout, stage: int) -> Sequence[range]:
    parts = stage_layers(shape.num_layers, parallel.pipeline * (parallel.virtual_pipeline or 1))
    return parts[stage :: parallel.pipeline]


def params_per_rank(shape: ParentShape, parallel: Layout, stage: int) -> tuple[float, float]:
    """(dense, routed-expert) parameters of one rank of a pipeline stage.

    Norms over the hidden width and the moe_router are whole on every rank, all else is split evenly.
    """
    fields, tensor, dense, routed = parent_fields(shape), parallel.tensor, 0.0, 0.0
    local_experts = shape.num_moe_experts / parallel.expert / size_of(parallel, "expert_tensor")
    for symbol in "".join(chunks_of_stage(shape, parallel, stage)):
        whole, split, one_expert = _params_of_layer(shape, symbol)
        dense += whole + split / tensor
        routed += one_expert * local_experts
    first, last = stage == 0, stage == parallel.pipeline - 1
    for t in ends(shape.tie_embeddings):
        if t.name.startswith("decoder."):
            dense += t.numel(fields) * last
        elif t.role == "lookup":
            # a tied embedding is also the last stage's output layer
            dense += t.numel(fields) / tensor * (first or (last and shape.tie_embeddings))
        else:
            dense += t.numel(fields) / tensor * last
    return dense, routed


@lru_cache(maxsize=64)
def _params_of_layer(shape: ParentShape, symbol: str) -> tuple[int, int, int]:
    """Parameters that every tensor rank holds, that tensor ranks share, and of one routed expert."""
    fields, out = parent_fields(shape), [0, 0, 0]
    for t in tensors_of(symbol, fields):
        kind = 2 if t.per_expert else 0 if t.name.startswith(_REPLICATED) else 1
        out[kind] += t.numel(fields)
    return out[0], out[1], out[2]


def _rounded(shape: ParentShape, parallel: LayoutSizes, stage: int, load: Load) -> float:
    """Copies of rounded weights: of all layers in flight in training, of one with recomputation, else of one weight."""
    fields, of_layers, largest = parent_fields(shape), [0.0], 0.0
    experts = shape.num_moe_experts / parallel.expert
    for layer in chain.from_iterable(_chunks(shape, parallel, stage)):
        copies = 0.0
        for t in tensors_of(shape.hybrid_layer_pattern[layer], fields):
            if (layer, t.name) in load.rounded:
                one = t.numel(fields) / size_of(parallel, "expert_tensor" if t.per_expert else "tensor")
                copies += one * (experts if t.per_expert else 1)
                largest = max(largest, one)
        of_layers.append(copies)
    kept = 0.0
    if load.training:
        kept = max(of_layers) if parallel.recompute else _in_flight(parallel, stage) * sum(of_layers)
    return load.size * (kept if load.training else largest) + 4 * largest


def _activations(shape: ParentShape, parallel: LayoutSizes, stage: int, load: Load) -> float:
    chunks = chunks_of_stage(shape, parallel, stage)
    symbols = "".join(chunks)
    of_layer = {s: _layer_bytes(shape, parallel, s, load) for s in set(symbols)}
    fullest = max(of_layer.values())
    if not load.training:
        return fullest
    entry = _residual_tokens(parallel, load.tokens) * shape.hidden_size * load.size
    kept = entry * len(symbols) if parallel.recompute else sum(of_layer[s] for s in symbols)
    kept += entry * (stage == 0)
    if load.teacher is not None:
        # its hidden states arrive in one message with the student's, which is kept whole
        width = load.teacher.hidden_size / shape.hidden_size
        kept += entry * width * (len(chunks) - (stage == 0))
    return _in_flight(parallel, stage) * kept + (fullest if parallel.recompute else 0.0)


def _in_flight(parallel: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage keeps at once, given enough of them (1F1B, Megatron's schedules).

    An interleaved stage warms up with 2 (p - 1 - stage) + (v - 1) p chunks and adds one; a chunk is 1 / v of
    what the stage keeps.
    """
    stages, chunks = parallel.pipeline, parallel.virtual_pipeline
    if chunks is None:
        return stages - stage
    return (2 * (stages - 1 - stage) + (chunks - 1) * stages + 1) / chunks


def _residual_tokens(parallel: Layout, tokens: int) -> float:
    return tokens / parallel.context / (parallel.tensor if parallel.sequence else 1)


def _layer_bytes(shape: ParentShape, parallel: Layout, symbol: str, load: Load) -> float:
    """Bytes that one layer keeps for one micro-batch; the formulas of the module docstring."""
    rows, split = _residual_tokens(parallel, load.tokens), load.tokens / parallel.context / parallel.tensor
    masked, extra = 1 if load.elastic else 0, 0.0
    numbers = (2 + masked) * rows * shape.hidden_size
    if symbol == "M":
        inner = shape.mamba_num_heads * shape.mamba_head_dim
        states = shape.mamba_num_groups * shape.mamba_state_dim
        projected = 2 * inner + 2 * states + shape.mamba_num_heads
        numbers += split * (projected + (inner + 2 * states) + (2 + masked) * inner)
    elif symbol == "*":
        heads = 2 * shape.num_attention_heads + 2 * shape.num_query_groups
        numbers += split * heads * shape.kv_channels
    elif symbol == "-":
        numbers += split * 2 * shape.ffn_hidden_size
    else:
        expert_tensor = size_of(parallel, "expert_tensor")
        dispatched = rows * shape.moe_router_topk * expert_tensor
        numbers += split * 2 * shape.moe_shared_expert_intermediate_size
        numbers += dispatched * (2 * shape.hidden_size + 2 * shape.moe_ffn_hidden_size / expert_tensor)
        if load.rounded:  # what several read is kept as it was, and rounded for each
            shared = rows if shape.moe_shared_expert_intermediate_size else 0
            numbers += (shared + dispatched) * shape.hidden_size
        extra = 4 * rows * shape.num_moe_experts
    return load.size * numbers + extra


def _logits(shape: ParentShape, parallel: Layout, load: Load) -> float:
    """What the loss makes of a micro-batch's hidden states; outside of training, logits in the model's type."""
    tokens, vocabulary = load.tokens / parallel.context, shape.vocab_size / parallel.tensor
    if not load.training:
        return tokens * vocabulary * load.size * load.logits
    widths = [m.hidden_size for m in (shape, load.teacher) if m is not None]
    return loss_bytes(tokens, vocabulary, tuple(widths), load.size, chunk=load.chunk)
