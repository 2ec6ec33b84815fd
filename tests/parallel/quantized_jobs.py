"""What ranks do in the tests of quantised training, and the family that they quantise: local widths of whole blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core import distributed as core
from megatron.core.dist_checkpointing import ShardedTensor, save
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallelConfig
from precision import keep_fp64
from ranking_jobs import random_state

from elastic_megatron import runtime
from elastic_megatron.blocks import build_model
from elastic_megatron.checkpoint import distributed
from elastic_megatron.checkpoint.amax import Amax, write_amax
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.recipe import load
from elastic_megatron.space import Budget, ElasticSpace, ParentShape, SubmodelSpec
from elastic_megatron.training.family import DTYPES
from elastic_megatron.training.train import train

SHAPE = ParentShape(
    "MEM*-E", 48, 264, max_position_embeddings=64, ffn_hidden_size=64, moe_ffn_hidden_size=64,
    moe_shared_expert_intermediate_size=64, num_moe_experts=8, moe_router_topk=3, moe_router_topk_scaling_factor=2.5,
    mamba_num_heads=4, mamba_head_dim=16, mamba_state_dim=8, mamba_num_groups=2, num_attention_heads=4,
    num_query_groups=2, kv_channels=16,
)  # fmt: skip
CHOICES = {
    "hidden_size": [32], "num_layers": [5], "ffn_hidden_size": [32], "moe_ffn_hidden_size": [32],
    "moe_shared_expert_intermediate_size": [32], "num_moe_experts": [6, 4], "mamba_num_heads": [2],
    "num_attention_heads": [2],
}  # fmt: skip
LANES = {a: 2 for a in ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "num_moe_experts")}  # fmt: skip
PER_LAYER = ["num_moe_experts", "moe_ffn_hidden_size", "mamba_num_heads"]
SPACE = ElasticSpace.build(SHAPE, CHOICES, LANES, per_layer=PER_LAYER)
WIDTHS: dict[str, dict[str, Any]] = {
    "full": {},
    "medium": {
        "hidden_size": 32,
        "num_moe_experts": [8, 4],
        "moe_ffn_hidden_size": [32, 64],
        "mamba_num_heads": [2, 4],
    },
    "small": SPACE.smallest().to_dict(),
}
# by their correction bias: two experts of one half, and one of each
UNSEEN = {"decoder.layers.1": [2, 3], "decoder.layers.5": [1, 6]}


def save_family(root: str) -> None:
    """A checkpoint with random weights of which some experts are never chosen."""
    runtime.start()
    model = build_model(SHAPE)
    state = {n: t / 2 if t.dim() == 2 else t for n, t in random_state(SHAPE, seed=3).items()}
    for layer, experts in UNSEEN.items():
        state[f"{layer}.mlp.router.expert_bias"][experts] = -9.0
    loaded = model.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys, loaded
    budgets = tuple(Budget(name, "active_params", 1 - i / 4) for i, name in enumerate(WIDTHS))
    whole = SPACE.full().to_dict()
    submodels = {name: SubmodelSpec.of(whole | widths) for name, widths in WIDTHS.items()}
    distributed.save(Path(root), 0, [model], Manifest(SHAPE, SPACE, budgets, submodels))


def _save(state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """With weights in fp32, the widest that exports read."""
    for name in [n for n in state if n.startswith("model")]:
        for key, shard in state[name].items():
            if isinstance(shard, ShardedTensor) and shard.dtype is torch.float64:
                state[name][key] = replace(shard, data=shard.data.to(torch.float32), dtype=torch.float32)
            elif isinstance(shard, ShardedTensorFactory) and shard.data.dtype is torch.float64:
                state[name][key] = replace(shard, data=shard.data.to(torch.float32))
    return save(state, *args, **kwargs)


def _write_amax(folder: Path, found: Mapping[str, Amax]) -> None:
    """In fp32, which ``Tensor.float`` is not here."""
    write_amax(folder, {name: Amax(*(t.to(torch.float32) for t in pair)) for name, pair in found.items()})


def _reducing_in_fp64(**settings: Any) -> DistributedDataParallelConfig:
    return DistributedDataParallelConfig(**{**settings, "grad_reduce_in_fp32": False})


def quantised(recipes: list[str]) -> list[list[dict[str, Any]]]:
    """Quantise and train in fp64, run by run; their logs, on the rank that has them.

    Rounding is a step function: in fp32 a sum in another order crosses a step once in some thousand tokens, and what
    follows differs by percents.
    """
    found = []
    with pytest.MonkeyPatch.context() as patch:
        keep_fp64(patch)
        patch.setitem(DTYPES, "fp32", torch.float64)
        patch.setattr(distributed, "write_amax", _write_amax)
        patch.setattr(dist_checkpointing, "save", _save)
        patch.setattr(core, "DistributedDataParallelConfig", _reducing_in_fp64)
        for recipe in recipes:
            outcome = train(load(Path(recipe)))
            text = (outcome.checkpoint.parent / "metrics.jsonl").read_text() if outcome.main else ""
            found.append([json.loads(line) for line in text.splitlines()])
    return found
