"""What the ranks do in the training tests, and the small model they train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ranking_jobs import random_state
from torch import Tensor

from elastic_megatron import runtime
from elastic_megatron.blocks import build_model
from elastic_megatron.checkpoint import distributed
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.recipe import load
from elastic_megatron.space import ParentShape
from elastic_megatron.training import train as module

# no size is a multiple of what the layouts do not ask for: SSM groups for TP2 x CP2, four lanes of experts
PARENT = ParentShape(
    "MEM*-E",
    hidden_size=26,
    vocab_size=264,
    max_position_embeddings=64,
    ffn_hidden_size=22,
    moe_ffn_hidden_size=14,
    moe_shared_expert_intermediate_size=18,
    num_moe_experts=12,
    moe_router_topk=3,
    moe_router_topk_scaling_factor=2.5,
    mamba_num_heads=12,
    mamba_head_dim=5,
    mamba_state_dim=7,
    mamba_num_groups=2,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=5,
)
CHOICES = {
    "hidden_size": [19, 14],
    "num_layers": [5],
    "ffn_hidden_size": [14, 6],
    "moe_ffn_hidden_size": [10, 6],
    "moe_shared_expert_intermediate_size": [10],
    "num_moe_experts": [8, 4],
    "mamba_num_heads": [8, 4],
    "mamba_head_dim": [3],
    "mamba_state_dim": [4],
    "num_attention_heads": [4, 2],
}
LANES = {"ffn_hidden_size": 2, "moe_ffn_hidden_size": 2, "moe_shared_expert_intermediate_size": 2, "num_moe_experts": 4}  # fmt: skip
PER_LAYER = ("num_moe_experts", "moe_ffn_hidden_size", "mamba_num_heads")
WITHOUT_MOE = "M-*M"
# the same on GPUs, whose kernels refuse most of these sizes (cost.kernel_rules)
ON_GPUS = PARENT.override(
    hidden_size=32, ffn_hidden_size=32, moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=32,
    mamba_head_dim=24, mamba_state_dim=16, kv_channels=16,
)  # fmt: skip
CHOICES_ON_GPUS = CHOICES | {
    "hidden_size": [24, 16],
    "ffn_hidden_size": [24, 16],
    "moe_ffn_hidden_size": [24, 16],
    "moe_shared_expert_intermediate_size": [16],
    "mamba_head_dim": [16],
    "mamba_state_dim": [8],
}


def parent_of(moe: bool, gpus: bool = False) -> ParentShape:
    parent = ON_GPUS if gpus else PARENT
    return parent if moe else parent.override(hybrid_layer_pattern=WITHOUT_MOE)


def space_section(moe: bool, gpus: bool = False) -> dict[str, Any]:
    """A recipe's ``space``: every axis of the model is elastic, some of them per layer."""
    parent, wanted = parent_of(moe), CHOICES_ON_GPUS if gpus else CHOICES
    choices = {a: c for a, c in wanted.items() if parent.size(a) and (moe or a != "num_layers")}
    return {
        "choices": choices,
        "lanes": {a: n for a, n in LANES.items() if a in choices},
        "per_layer": [a for a in PER_LAYER if a in choices],
    }


def save_parent(root: str, moe: bool, tied: bool, gpus: bool = False) -> None:
    """A checkpoint with random weights, of a size that keeps experts' ties rare."""
    runtime.start()
    shape = parent_of(moe, gpus).override(tie_embeddings=tied)
    model = build_model(shape)
    state = {n: t / 2 if t.dim() == 2 else t for n, t in random_state(shape, seed=3).items()}
    loaded = model.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys, loaded
    distributed.save(Path(root), 0, [model], Manifest(shape=shape))


def trained(recipe: str) -> dict[str, Any]:
    """Train, and return this rank's router and the run's log."""
    models = []
    build = module.build_student

    def building(*args: Any, **kwargs: Any) -> Any:
        models.append(build(*args, **kwargs))
        return models[-1]

    module.build_student = building
    try:
        outcome = module.train(load(Path(recipe)))
    finally:
        module.build_student = build
    router: dict[str, Tensor] = {n: p.detach().clone() for n, p in models[0].router.named_parameters()}
    text = (outcome.checkpoint.parent / "metrics.jsonl").read_text() if outcome.main else ""
    return {"router": router, "lines": [json.loads(line) for line in text.splitlines()]}
