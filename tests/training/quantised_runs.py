"""A small family with random weights whose widths are whole blocks, and recipes that quantise it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from laws import randomise

from elastic_megatron import runtime
from elastic_megatron.blocks import build_elastic_model
from elastic_megatron.checkpoint import distributed
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.recipe import Recipe, load
from elastic_megatron.space import Budget, ElasticSpace, ParentShape, SubmodelSpec

SHAPE = ParentShape(
    "MEM*E-", 32, 264, ffn_hidden_size=48, moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=32,
    num_moe_experts=6, moe_router_topk=2, moe_router_topk_scaling_factor=2.5, mamba_num_heads=4, mamba_head_dim=16,
    mamba_state_dim=8, mamba_num_groups=2, num_attention_heads=4, num_query_groups=2, kv_channels=16,
    max_position_embeddings=64,
)  # fmt: skip
CHOICES = {
    "hidden_size": [16], "ffn_hidden_size": [32, 16], "moe_ffn_hidden_size": [16], "num_moe_experts": [4, 3],
    "mamba_num_heads": [2], "num_layers": [5],
}  # fmt: skip
SPACE = ElasticSpace.build(SHAPE, CHOICES, per_layer=["num_moe_experts"], layer_order=(0, 1, 3, 2, 5, 4))
BUDGETS = (
    Budget("full", "active_params", 1.0),
    Budget("medium", "active_params", 0.8),
    Budget("small", "total_params", 0.5),
)
_MEDIUM = {"num_moe_experts": [4, 6], "ffn_hidden_size": 32, "mamba_num_heads": 2}
SUBMODELS = {
    "full": SPACE.full(),
    "medium": SubmodelSpec.of(SPACE.full().to_dict() | _MEDIUM),
    "small": SPACE.smallest(),
}
# never chosen, by their correction bias: (layer, expert)
UNSEEN = {"decoder.layers.1": [2], "decoder.layers.4": [0, 5]}
QUANTIZE = {"format": "nvfp4", "preset": "default", "keep_feeding_mamba": True, "samples": 6, "seq_length": 16,
            "micro_batch_size": 4}  # fmt: skip
STAGES = [
    {"name": "qad", "tokens": 6 * 4 * 16, "seq_length": 16, "global_batch_size": 4, "micro_batch_size": 2}
]
SEED = 2
WriteRecipe = Callable[..., Path]


def save_family(directory: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A run folder whose newest checkpoint is the family; returns that ``iter_*`` folder."""
    runtime.start(seed=SEED)
    model = randomise(build_elastic_model(SPACE, dtype=dtype), seed=SEED)
    with torch.no_grad():
        # even where the smallest model has no channels: there those that it keeps reach furthest beyond their norm
        even = model.embedding.word_embeddings.weight[:, 16:]
        even.copy_(0.12 * even.sign())
    for layer, experts in UNSEEN.items():
        model.get_submodule(layer).mlp.router.expert_bias[experts] = -9.0
    manifest = Manifest(shape=SHAPE, space=SPACE, budgets=BUDGETS, submodels=SUBMODELS)
    return distributed.save(directory / "checkpoints", 7, [model], manifest)


def recipe_of(write: WriteRecipe, run_dir: Path, family: Path, **sections: Any) -> Recipe:
    """A recipe that quantises a family; ``quantize`` updates its section, other sections replace it."""
    budgets = {b.name: {"metric": b.metric, "target": b.target} for b in BUDGETS}
    values: dict[str, Any] = {
        "model": {"dtype": "fp32", "checkpoint": str(family)},
        "budgets": budgets,
        "space": {"choices": CHOICES, "per_layer": ["num_moe_experts"]},
        "stages": STAGES,
        "checkpoint": {"interval": 2, "keep_last": 9},
        **sections,
        "quantize": QUANTIZE | sections.get("quantize", {}),
    }
    return load(write(run_dir, **values))
