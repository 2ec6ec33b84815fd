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
- a stage behind another: n' hidden of the teacher for each of its chunks, received beside the student's.

The way of counting is that of arXiv 2205.05198. Left out: temporary buffers (in the distillation loss about as
much as the logits), communication, fragmentation (allow 10 to 20 %), the budget router (thousands of
parameters) and the masks.
"""

from __future__ import annotations

from ..space import ParentShape, ends, stage_layers, tensors_of
from .parallel import Layout, size_of, smallest_world
from .sizes import parent_fields

_BYTES = {"fp32": 4, "bf16": 2}
_REPLICATED = ("norm.", "input_layernorm.", "pre_mlp_layernorm.", "mlp.router.")


def memory_per_rank(
    shape: ParentShape,
    parallel: Layout,
    *,
    dtype: str,
    training: bool,
    seq_length: int,
    micro_batch_size: int,
    teacher: bool,
    recompute: bool = False,
    distributed_optimizer: bool = False,
) -> dict[str, int]:
    """Bytes on the fullest rank: ``weights, gradients, optimizer, teacher, activations, total``.

    A parameter costs its weight (bf16 2, fp32 4), in training an fp32 gradient (4) and Adam (bf16: fp32 copy
    and two moments, 12; fp32: two moments, 8). The teacher is a second set of frozen weights. Activations are
    those of the micro-batches in flight (module docstring), and the logits.

    Args:
        dtype: ``fp32`` or ``bf16``.
        training: without it nothing is kept for a backward pass.
        recompute: full recomputation, which keeps a layer's input and one layer's other activations.
        distributed_optimizer: Adam's state is split over data-parallel ranks (needs ``world_size``).
    """
    stages = [
        _stage(shape, parallel, stage, dtype, training, seq_length * micro_batch_size, teacher, recompute,
               distributed_optimizer)
        for stage in range(parallel.pipeline)
    ]  # fmt: skip
    return max(stages, key=lambda s: s["total"])


def _stage(
    shape: ParentShape, parallel: Layout, stage: int, dtype: str, training: bool, tokens: int, teacher: bool,
    recompute: bool, distributed_optimizer: bool,
) -> dict[str, int]:  # fmt: skip
    dense, routed = params_per_rank(shape, parallel, stage)
    size, replicas = _BYTES[dtype], _replicas(parallel) if distributed_optimizer else (1.0, 1.0)
    out: dict[str, float] = {"weights": size * (dense + routed), "gradients": 0, "optimizer": 0, "teacher": 0}
    if training:
        adam = 12 if dtype == "bf16" else 8
        out["gradients"] = 4 * (dense + routed)
        out["optimizer"] = adam * (dense / replicas[0] + routed / replicas[1])
    if teacher:
        out["teacher"] = out["weights"]
    out["activations"] = _activations(shape, parallel, stage, size, training, tokens, teacher, recompute)
    if stage == parallel.pipeline - 1:
        out["activations"] += _logits(shape, parallel, size, training, tokens, teacher)
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
    parts = stage_layers(shape.num_layers, parallel.pipeline * (parallel.virtual_pipeline or 1))
    pattern = shape.hybrid_layer_pattern
    return [pattern[part.start : part.stop] for part in parts[stage :: parallel.pipeline]]


def params_per_rank(shape: ParentShape, parallel: Layout, stage: int) -> tuple[float, float]:
    """(dense, routed-expert) parameters of one rank of a pipeline stage.

    Norms over the hidden width and the moe_router are whole on every rank, all else is split evenly.
    """
    fields, tensor, dense, routed = parent_fields(shape), parallel.tensor, 0.0, 0.0
    local_experts = shape.num_moe_experts / parallel.expert / size_of(parallel, "expert_tensor")
    for symbol in "".join(chunks_of_stage(shape, parallel, stage)):
        for t in tensors_of(symbol, fields):
            if t.per_expert:
                routed += t.numel(fields) * local_experts
            elif t.name.startswith(_REPLICATED):
                dense += t.numel(fields)
            else:
                dense += t.numel(fields) / tensor
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


def _activations(
    shape: ParentShape, parallel: Layout, stage: int, size: int, training: bool, tokens: int, teacher: bool,
    recompute: bool,
) -> float:  # fmt: skip
    chunks = chunks_of_stage(shape, parallel, stage)
    layers = [_layer_bytes(shape, parallel, s, size, tokens) for s in "".join(chunks)]
    if not training:
        return max(layers)
    kept = sum(layers)
    entry = _residual_tokens(parallel, tokens) * shape.hidden_size * size
    if recompute:
        kept = entry * len(layers)
    kept += entry * (stage == 0)
    # the teacher's hidden states arrive in one message with the student's, which is kept whole
    kept += entry * teacher * (len(chunks) - (stage == 0))
    return _in_flight(parallel, stage) * kept + (max(layers) if recompute else 0.0)


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


def _layer_bytes(shape: ParentShape, parallel: Layout, symbol: str, size: int, tokens: int) -> float:
    """Bytes that one layer keeps for one micro-batch; the formulas of the module docstring."""
    rows, split = _residual_tokens(parallel, tokens), tokens / parallel.context / parallel.tensor
    numbers = 2 * rows * shape.hidden_size
    extra = 0.0
    if symbol == "M":
        inner, states = (
            shape.mamba_num_heads * shape.mamba_head_dim,
            shape.mamba_num_groups * shape.mamba_state_dim,
        )
        numbers += split * (
            (2 * inner + 2 * states + shape.mamba_num_heads) + (inner + 2 * states) + 2 * inner
        )
    elif symbol == "*":
        numbers += split * 2 * (shape.num_attention_heads + shape.num_query_groups) * shape.kv_channels
    elif symbol == "-":
        numbers += split * 2 * shape.ffn_hidden_size
    else:
        expert_tensor = size_of(parallel, "expert_tensor")
        dispatched = rows * shape.moe_router_topk * expert_tensor
        numbers += split * 2 * shape.moe_shared_expert_intermediate_size
        numbers += dispatched * 2 * (shape.hidden_size + shape.moe_ffn_hidden_size / expert_tensor)
        extra = 4 * rows * shape.num_moe_experts
    return size * numbers + extra


def _logits(
    shape: ParentShape, parallel: Layout, size: int, training: bool, tokens: int, teacher: bool
) -> float:
    """Logits in the model's dtype and, in training, their fp32 log-softmax; the same again of a teacher."""
    entries = tokens / parallel.context * shape.vocab_size / parallel.tensor
    one = size + 4 if training else size
    return entries * one * (2 if teacher else 1)
