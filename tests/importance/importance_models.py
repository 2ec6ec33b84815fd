"""Tiny models in fp64 whose norms, biases and matrices are randomised, and rankings to sort them by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from elastic_megatron.checkpoint.slice import permute_state
from elastic_megatron.checkpoint.sort import sort_orders
from elastic_megatron.importance import Ranking, order_of
from elastic_megatron.space import ElasticSpace, ParentShape, axis

PARENT = ParentShape(
    "MEM*E-",
    hidden_size=48,
    vocab_size=97,
    ffn_hidden_size=40,
    moe_ffn_hidden_size=24,
    moe_shared_expert_intermediate_size=36,
    num_moe_experts=8,
    moe_router_topk=3,
    moe_router_topk_scaling_factor=2.5,
    mamba_num_heads=8,
    mamba_head_dim=6,
    mamba_state_dim=10,
    mamba_num_groups=2,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=8,
)
CHOICES = {
    "hidden_size": [32, 19],
    "ffn_hidden_size": [20],
    "moe_ffn_hidden_size": [12],
    "moe_shared_expert_intermediate_size": [18],
    "num_moe_experts": [4],
    "mamba_num_heads": [6, 4],
    "mamba_head_dim": [4],
    "mamba_state_dim": [7],
    "num_attention_heads": [4],
    "num_layers": [4],
}
LANES = {
    "ffn_hidden_size": 4,
    "moe_ffn_hidden_size": 2,
    "moe_shared_expert_intermediate_size": 2,
    "num_moe_experts": 4,
    "num_attention_heads": 4,
}


class _KeepDouble(TorchFunctionMode):
    """``.float()`` of fp64 is the identity: Megatron rounds router logits to fp32 whatever the model's type."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float and args[0].dtype is torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def space_of(*axes: str) -> ElasticSpace:
    return ElasticSpace.build(
        PARENT, {a: CHOICES[a] for a in axes}, {a: n for a, n in LANES.items() if a in axes}
    )


def build(parent: ParentShape = PARENT, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    from elastic_megatron import runtime
    from elastic_megatron.blocks import build_model

    runtime.start(seed=seed)
    model = build_model(parent, dtype=dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.mul_(4)
            elif "norm" in name or name.endswith((".D", "bias")):
                p.add_(0.3 * torch.randn_like(p))
        for name, b in model.named_buffers():
            if name.endswith("expert_bias"):
                b.copy_(0.05 * torch.randn_like(b))
    return model


def tokens(rows: int = 4, length: int = 19, seed: int = 1) -> Tensor:
    return torch.randint(0, PARENT.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad(), _KeepDouble():
        return model(ids, positions, None)


@contextmanager
def exact() -> Iterator[None]:
    with _KeepDouble():
        yield


def random_ranking(parent: ParentShape, axes: tuple[str, ...], seed: int = 0) -> Ranking:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    scores = {}
    for a in axes:
        if not axis(a).symbol:
            scores[a] = draw(parent.size(a))
        for i in parent.layers_of(axis(a).symbol) if axis(a).symbol else ():
            experts = (parent.num_moe_experts,) if a == "moe_ffn_hidden_size" else ()
            scores[f"layers.{i}.{a}"] = draw(*experts, parent.size(a))
    orders = {k: order_of(v, parent.groups(k.rpartition(".")[2])) for k, v in scores.items()}
    return Ranking(scores, orders, {}, parent.hybrid_layer_pattern, 0, "")


def sorted_state(
    space: ElasticSpace, ranking: Ranking, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The same model, sorted, tensor by tensor: what ``sort_model`` must make of it in place."""
    return permute_state(space.parent, sort_orders(space, ranking), state.items())


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
