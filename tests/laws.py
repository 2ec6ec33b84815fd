"""Small models with odd sizes and loud weights, and the comparisons that the law tests share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from elastic_megatron import runtime
from elastic_megatron.blocks import build_elastic_model, build_sliced_model, elastic_stack, running
from elastic_megatron.checkpoint.slice import slice_state
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.ops.locate import weights
from elastic_megatron.space import ElasticSpace, ParentShape, SubmodelSpec

PATTERN = "MEM*E-M"
SHAPE = ParentShape(
    hybrid_layer_pattern=PATTERN,
    hidden_size=35,
    vocab_size=53,
    ffn_hidden_size=21,
    moe_ffn_hidden_size=11,
    moe_shared_expert_intermediate_size=13,
    num_moe_experts=8,
    moe_router_topk=2,
    moe_router_topk_scaling_factor=2.5,
    mamba_num_heads=6,
    mamba_head_dim=5,
    mamba_state_dim=7,
    mamba_num_groups=2,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=5,
)
CHOICES: dict[str, list[int]] = {
    "hidden_size": [27, 16],
    "num_layers": [5, 4],
    "ffn_hidden_size": [14, 7],
    "moe_ffn_hidden_size": [7, 3],
    "moe_shared_expert_intermediate_size": [9, 4],
    "num_moe_experts": [6, 4],
    "mamba_num_heads": [4, 2],
    "mamba_head_dim": [3],
    "mamba_state_dim": [4],
    "num_attention_heads": [4, 2],
}
LANES = {"num_moe_experts": 2, "ffn_hidden_size": 7}
PER_LAYER = ("mamba_num_heads", "moe_ffn_hidden_size", "num_moe_experts", "mamba_state_dim")
LAYER_ORDER = (3, 1, 0, 4, 6, 2, 5)
HETEROGENEOUS: dict[str, Any] = {
    "hidden_size": 27,
    "num_layers": 7,
    "ffn_hidden_size": 14,
    "moe_ffn_hidden_size": [3, 11],
    "moe_shared_expert_intermediate_size": 9,
    "num_moe_experts": [4, 6],
    "mamba_num_heads": [6, 2, 4],
    "mamba_head_dim": 3,
    "mamba_state_dim": [7, 4, 7],
    "num_attention_heads": 4,
}


def subspace(pattern: str = PATTERN, *, per_layer: bool = True, **sizes: Any) -> ElasticSpace:
    """The space above for a pattern that may lack some layer types."""
    parent = SHAPE.override(hybrid_layer_pattern=pattern, **sizes)
    choices = {a: w for a, w in CHOICES.items() if parent.size(a) and a != "num_layers"}
    order: Sequence[int] = ()
    if pattern == PATTERN:
        choices["num_layers"], order = CHOICES["num_layers"], LAYER_ORDER
    return ElasticSpace.build(
        parent,
        choices,
        {a: n for a, n in LANES.items() if a in choices},
        per_layer=[a for a in PER_LAYER if a in choices] if per_layer else (),
        layer_order=order,
    )


def spec_of(space: ElasticSpace, **widths: Any) -> SubmodelSpec:
    """The full model with some widths changed."""
    spec = SubmodelSpec.of({**space.full().to_dict(), **widths})
    space.check(spec)
    return spec


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights x 4; norms, D, dt_bias and the correction bias (often negative) random: no ones, no zeros."""
    g = torch.Generator().manual_seed(seed)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=g, dtype=torch.float64).to(t)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("budget_router."):
                continue
            if p.dim() >= 2:
                p.mul_(4)
            elif "norm" in name:
                p.add_(0.2 * noise(p))
            elif name.endswith((".D", "dt_bias", "conv1d_bias")):
                p.add_(0.3 * noise(p))
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(0.3 * noise(buffer) - 0.1)
    return model


def build_elastic(
    space: ElasticSpace, dtype: torch.dtype = torch.float64, seed: int = 0, **overrides: Any
) -> Any:
    runtime.start(seed=seed)  # Megatron draws weights from its own generators, not torch's
    return randomise(build_elastic_model(space, dtype=dtype, **overrides), seed)


def build_slice(model: nn.Module, space: ElasticSpace, spec: SubmodelSpec, dtype: torch.dtype = torch.float64,
                **overrides: Any) -> Any:  # fmt: skip
    """The plain model that the fact table cuts out of an elastic one."""
    out = build_sliced_model(space, spec, dtype=dtype, **overrides)
    state = dict(slice_state(space, spec, weights(model.state_dict()).items()))
    loaded = out.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys and all("_extra_state" in k for k in loaded.missing_keys), loaded
    return out


def tokens(space: ElasticSpace, batch: int = 2, length: int = 13, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and positions, [batch, length] each."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, space.parent.vocab_size, (batch, length), generator=g)
    return ids, torch.arange(length).expand(batch, -1)


def one_hot(space: ElasticSpace, spec: SubmodelSpec, dtype: torch.dtype = torch.float64) -> SubmodelMix:
    return SubmodelMix.one_hot(space, spec, dtype=dtype)


def soft_mix(space: ElasticSpace, seed: int, sharpness: float = 1.0) -> SubmodelMix:
    """Random probabilities as fp64 leaves that require gradient."""
    g = torch.Generator().manual_seed(seed)
    probs = {}
    for a in space.axes:
        rows = (len(space.layers(a)),) if a in space.per_layer else ()
        logits = torch.randn(*rows, len(space.choices_of(a)), generator=g, dtype=torch.float64)
        probs[a] = torch.softmax(sharpness * logits, -1).requires_grad_()
    return SubmodelMix(space, probs)


def run(model: nn.Module, mix: SubmodelMix | None, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """Logits [batch, length, vocabulary] of an elastic model under a mix, or of the parent."""
    with running(model, mix):
        return model(*inputs, None)


def scalar(logits: Tensor, seed: int = 0) -> Tensor:
    """A loss that weighs every logit differently."""
    g = torch.Generator().manual_seed(seed)
    return (logits * torch.randn(logits.shape, generator=g, dtype=torch.float64).to(logits)).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def relative(a: Tensor, b: Tensor) -> float:
    """Frobenius distance relative to b."""
    a, b = a.detach(), b.detach()
    norm = b.double().norm()
    return float((a.double() - b.double()).norm() / (norm if norm > 0 else 1.0))


def worst(a: Mapping[str, Tensor], b: Mapping[str, Tensor], floor: float = 1e-12) -> tuple[float, str]:
    """Largest relative distance over named tensors; none counts as smaller than ``floor`` x the largest."""
    assert set(a) == set(b), set(a) ^ set(b)
    scale = floor * max(float(v.double().norm()) for v in b.values())
    found = [
        (float((a[n].double() - b[n].double()).norm() / max(float(b[n].double().norm()), scale)), n)
        for n in b
    ]
    return max(found)


@contextmanager
def recomputing(model: nn.Module, method: str | None, num_layers: int = 1) -> Iterator[None]:
    """Full activation recomputation switched on for a built model; ``None``: off."""
    config = elastic_stack(model).config
    before = config.recompute_granularity, config.recompute_method, config.recompute_num_layers
    config.recompute_granularity = "full" if method else None
    config.recompute_method, config.recompute_num_layers = method, num_layers
    try:
        yield
    finally:
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = before
