"""Parameters, FLOPs and bytes of a model, each a sum over the fact table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..space import Budget, ElasticSpace, ParentShape, SubmodelSpec, ends, tensors_of
from ..space.layouts import Number
from .memory import cache_bytes, peak_buffer_bytes, weight_bytes
from .sizes import ModelSizes, sizes_of_parent, sizes_of_spec

__all__ = ["Cost", "account", "active_params", "flops_per_token", "metric", "sizes_of_parent", "sizes_of_spec",
           "total_params"]  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What one model costs. Parameters are counts, FLOPs are of one forward token, memory is in bytes."""

    total_params: int
    active_params: int
    flops_per_token: float
    weights_bytes: dict[str, float]
    cache_bytes_per_sequence: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def total_params(model: ModelSizes) -> Number:
    """All parameters, the moe_router's correction bias included, as published counts do."""
    return _params(model, "num_moe_experts")


def active_params(model: ModelSizes) -> Number:
    """Parameters that one token meets: top-k routed experts instead of all; embedding and head count whole."""
    return _params(model, "moe_router_topk")


def _params(model: ModelSizes, experts: str) -> Number:
    """Parameters of a model; an expert's count as often as the size named ``experts`` says."""
    blocks = sum(
        g.total(
            sum(
                t.numel(g.sizes) * (g.sizes[experts] if t.per_expert else 1)
                for t in tensors_of(g.symbol, g.sizes)
            )
        )
        for g in model.groups
    )
    return blocks + sum(t.numel(model.ends()) for t in ends(model.parent.tie_embeddings))


def flops_per_token(model: ModelSizes, context_length: int) -> Number:
    """Forward FLOPs of one token, a multiply-add counting two, at the mean position of a causal context.

    Matrix products: 2 x weights met. Attention: scores and mix over half the context. Convolution: 2 x taps
    per channel. State space: 5 per state element (decay; outer product and add; read-out), its recurrent
    form, which is what decoding pays and a lower bound of the chunked scan.
    """
    flops: Number = 2 * model.parent.vocab_size * model.hidden_size
    for g in model.groups:
        s = g.sizes
        per_layer: Number = 0
        for t in tensors_of(g.symbol, s):
            if t.role == "matmul":
                per_layer = per_layer + 2 * t.numel(s) * (s["moe_router_topk"] if t.per_expert else 1)
        if g.symbol == "*":
            per_layer = per_layer + 4 * s["num_attention_heads"] * s["kv_channels"] * context_length / 2
        elif g.symbol == "M":
            inner = s["mamba_num_heads"] * s["mamba_head_dim"]
            channels = inner + 2 * s["mamba_num_groups"] * s["mamba_state_dim"]
            per_layer = per_layer + 2 * s["conv_kernel"] * channels + 5 * inner * s["mamba_state_dim"]
        flops = flops + g.total(per_layer)
    return flops


def memory_bytes(model: ModelSizes, budget: Budget) -> Number:
    """Bytes resident while decoding: weights (all experts), caches and the largest transient buffer."""
    return (
        weight_bytes(model, budget.format)
        + budget.batch_size * cache_bytes(model, budget.sequence_length)
        + peak_buffer_bytes(model, budget.batch_size, budget.sequence_length)
    )


def metric(model: ModelSizes, budget: Budget) -> Number:
    """The quantity a budget limits, in its own unit; differentiable where the sizes are tensors."""
    if budget.metric == "active_params":
        return active_params(model)
    if budget.metric == "total_params":
        return total_params(model)
    if budget.metric == "memory_bytes":
        return memory_bytes(model, budget)
    from .latency import LatencyTable

    assert budget.table is not None, "a latency budget carries its table"
    return LatencyTable.load(budget.table).seconds(model)


def account(space_or_parent: ElasticSpace | ParentShape, spec: SubmodelSpec | None = None,
            context_length: int = 8192) -> Cost:  # fmt: skip
    """The cost of a submodel, or of a parent as it stands; caches for ``context_length`` tokens."""
    if isinstance(space_or_parent, ParentShape):
        model = sizes_of_parent(space_or_parent)
    else:
        model = sizes_of_spec(space_or_parent, spec or space_or_parent.full())
    return Cost(
        total_params=total_params(model),
        active_params=active_params(model),
        flops_per_token=flops_per_token(model, context_length),
        weights_bytes={f: weight_bytes(model, f) for f in ("bf16", "fp8", "nvfp4")},
        cache_bytes_per_sequence=cache_bytes(model, context_length),
    )
