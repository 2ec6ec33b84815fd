"""Bytes: weights by format, key/value and state caches, and the largest transient buffer."""

from __future__ import annotations

from ..quantization.formats import FORMATS
from ..space import TensorLayout, ends, tensors_of
from ..space.layouts import Number
from .sizes import LayerGroup, ModelSizes

QUANTISED = {form.name: form for form in FORMATS.values()}
BUFFER_TOKENS = 16384  # a prefill chunk, as in upstream's memory profiles


def quantised(group: LayerGroup, layout: TensorLayout) -> bool:
    """Is this tensor quantised in a low-precision checkpoint?

    The layout of the official Nemotron 3 Nano checkpoints (arXiv 2512.20848): attention, the Mamba layers
    that feed it, convolutions, norms, embeddings and head stay BF16, the moe_router stays high precision;
    routed and shared experts, dense MLPs and the other Mamba projections are quantised.
    """
    if layout.role != "matmul" or layout.fp32:
        return False
    return group.symbol in "E-" or (group.symbol == "M" and not group.feeds_attention)


def weight_bytes(model: ModelSizes, fmt: str) -> Number:
    """Bytes of all weights on disk or resident, every routed expert counted."""
    total: Number = 2 * sum(t.numel(model.ends()) for t in ends(model.parent.tie_embeddings))
    for g in model.groups:
        per_layer: Number = 0
        for t in tensors_of(g.symbol, g.sizes):
            copies = g.sizes["num_moe_experts"] if t.per_expert else 1
            if fmt != "bf16" and quantised(g, t):
                form = QUANTISED[fmt]
                per_layer = per_layer + copies * (form.value_bytes * t.numel(g.sizes) + form.scalar_bytes)
            else:
                per_layer = per_layer + copies * 2 * t.numel(g.sizes)
        total = total + g.total(per_layer)
    return total


def cache_bytes(model: ModelSizes, sequence_length: int) -> Number:
    """Bytes one sequence keeps while decoding: BF16 keys and values, BF16 convolution and fp32 SSM states."""
    total: Number = 0
    for g in model.groups:
        s = g.sizes
        if g.symbol == "*":
            total = total + g.total(2 * 2 * sequence_length * s["num_query_groups"] * s["kv_channels"])
        elif g.symbol == "M":
            inner = s["mamba_num_heads"] * s["mamba_head_dim"]
            conv = (inner + 2 * s["mamba_num_groups"] * s["mamba_state_dim"]) * (s["conv_kernel"] - 1)
            total = total + g.total(2 * conv + 4 * inner * s["mamba_state_dim"])
    return total


def peak_buffer_bytes(model: ModelSizes, batch_size: int, sequence_length: int) -> Number:
    """BF16 activations of the widest feed-forward layer over one prefill chunk."""
    tokens = min(batch_size * sequence_length, BUFFER_TOKENS)
    widest: Number = 0
    for g in model.groups:
        s = g.sizes
        width: Number = 0
        if g.symbol == "E":
            width = s["moe_shared_expert_intermediate_size"] + s["moe_router_topk"] * s["moe_ffn_hidden_size"]
        elif g.symbol == "-":
            width = s["ffn_hidden_size"]
        if hasattr(g.weight, "dim"):
            width = (width * g.weight).max()  # a layer that is left out has no buffer
        widest = _larger(width, widest)
    return 2 * tokens * widest


def _larger(a: Number, b: Number) -> Number:
    """The larger of two, without a look at the device where either is a tensor."""
    if not hasattr(a, "dim"):
        a, b = b, a
    if not hasattr(a, "dim"):
        return max(a, b)
    return a.maximum(b) if hasattr(b, "dim") else a.clamp_min(b)
