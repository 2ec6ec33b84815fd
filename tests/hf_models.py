"""Small models for the Hugging Face tests: shapes, spaces and random states, without Megatron."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.stored import model_tensors
from elastic_megatron.space import ElasticSpace, ParentShape, SubmodelSpec

FAMILY = {
    "large": {},
    "middle": {"hidden_size": 12, "num_layers": 6, "num_moe_experts": 6, "moe_ffn_hidden_size": 8,
               "mamba_num_heads": 6, "num_attention_heads": 6, "ffn_hidden_size": 8, "mamba_head_dim": 3},
    "small": {"hidden_size": 5, "num_layers": 4, "num_moe_experts": 4, "moe_ffn_hidden_size": 4,
              "mamba_num_heads": 2, "num_attention_heads": 4, "ffn_hidden_size": 4, "mamba_head_dim": 2},
}  # fmt: skip


def parent(**sizes: object) -> ParentShape:
    defaults = ParentShape(
        "MEM*E-M", 16, 20, ffn_hidden_size=12, moe_ffn_hidden_size=12, moe_shared_expert_intermediate_size=6,
        num_moe_experts=8, moe_router_topk=2, moe_router_topk_scaling_factor=2.5, mamba_num_heads=8,
        mamba_head_dim=4, mamba_state_dim=3, mamba_num_groups=2, num_attention_heads=8, num_query_groups=2,
        kv_channels=4,
    )  # fmt: skip
    return defaults.override(**sizes)


def manifest(shape: ParentShape | None = None, lanes: int = 2) -> Manifest:
    """A family of three over lanes, with one axis per layer and layers ranked out of order."""
    shape = shape or parent()
    choices = {a: [FAMILY[n][a] for n in ("middle", "small")] for a in FAMILY["small"]}
    dealt = {a: lanes for a in ("num_moe_experts", "moe_ffn_hidden_size", "ffn_hidden_size")}
    space = ElasticSpace.build(
        shape, choices, dealt, per_layer=["num_moe_experts"], layer_order=[3, 1, 0, 6, 4, 2, 5]
    )
    submodels = {n: SubmodelSpec.of(space.full().to_dict() | widths) for n, widths in FAMILY.items()}
    return Manifest(shape=shape, space=space, submodels=submodels)


def random_state(shape: ParentShape, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        tensor.name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for tensor in model_tensors(shape)
    }


def stored(directory: Path) -> dict[str, Tensor]:
    """Every tensor on disk, under its Hugging Face name."""
    out: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            out |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return out


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@st.composite
def shapes(draw: st.DrawFn) -> ParentShape:
    """Any small model that ``nemotron_h`` can state."""
    groups, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    pattern = draw(st.text("M*E-", min_size=1, max_size=5))
    least = 1 if "-" in pattern else 0
    return parent(
        hybrid_layer_pattern=pattern,
        hidden_size=draw(st.integers(1, 7)),
        ffn_hidden_size=draw(st.integers(1, 5)),
        moe_ffn_hidden_size=draw(st.integers(1, 5)),
        moe_shared_expert_intermediate_size=draw(st.integers(least, 3)),
        num_moe_experts=draw(st.integers(2, 5)),
        mamba_num_groups=groups,
        mamba_num_heads=groups * draw(st.integers(1, 3)),
        mamba_head_dim=draw(st.integers(1, 3)),
        num_query_groups=queries,
        num_attention_heads=queries * draw(st.integers(1, 3)),
        kv_channels=draw(st.integers(1, 4)),
        tie_embeddings=draw(st.booleans()),
    )
