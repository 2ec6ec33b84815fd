"""``config.json`` of an exported model: the parent's, with only the sliced fields changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UserError
from ..space import ParentShape
from .manifest import Manifest

# Megatron, mamba-ssm's kernels and vLLM bound dt by (0, inf); transformers' own mixer clamps it from below at
# time_step_min. The smallest value that keeps its random initialisation finite (it takes the logarithm) stands
# for 0: softplus reaches it at -69, where a step of 1e-30 changes nothing that fp32 can hold.
NO_CLAMP = 1e-30

_COMPLETE: Mapping[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "use_cache": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "use_bias": False,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "use_conv_bias": True,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "initializer_range": 0.02,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
}


def hf_config(manifest: Manifest, shape: ParentShape, remote_code: bool) -> dict[str, Any]:
    """The ``config.json`` of ``shape``, a submodel (or the whole) of the manifest's model.

    Where the manifest has no config of a parent, it is a complete one with the options of the family.

    Args:
        remote_code: whether the directory gets the files that ``auto_map`` names; without them it is dropped.

    Raises ``UserError`` for a shape that ``nemotron_h`` cannot state.
    """
    base = dict(manifest.hf_config) or {**_COMPLETE, **manifest.shape.to_hf()}
    before = manifest.shape.to_hf()
    changed = {k: v for k, v in shape.to_hf().items() if k not in base or before.get(k) != v}
    if "layers_block_type" in changed:
        changed |= _layer_types(base, manifest.shape, shape, changed["layers_block_type"])
    config = base | changed | {"time_step_min": NO_CLAMP}
    if "auto_map" in base and "layers_block_type" not in base:
        # there it is a property without a setter, and loading would fail
        config.pop("layers_block_type", None)
    if not remote_code:
        config.pop("auto_map", None)
    return config | _no_shared_experts(shape)


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config with the dtype that loaders choose by default, under the spelling(s) it has already."""
    name = str(dtype).removeprefix("torch.")
    spellings = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(spellings, name)}


def _layer_types(
    base: Mapping[str, Any], before: ParentShape, shape: ParentShape, default: list[str]
) -> dict[str, Any]:
    """Layer types in the parent's spelling, which changed with transformers 5.14."""
    known = base.get("layers_block_type")
    if not known:
        return {"layers_block_type": default}
    spelling = dict(zip(before.hybrid_layer_pattern, known, strict=True))
    return {"layers_block_type": [spelling[s] for s in shape.hybrid_layer_pattern]}


def _no_shared_experts(shape: ParentShape) -> dict[str, Any]:
    """Fields that make transformers, which always builds shared experts, build them with width 0."""
    if "E" not in shape.hybrid_layer_pattern or shape.moe_shared_expert_intermediate_size:
        return {}
    if "-" in shape.hybrid_layer_pattern:
        raise UserError(
            "a nemotron_h model with both dense MLP and MoE layers needs shared experts: transformers would give "
            "them the dense width and random weights; train with moe_shared_expert_intermediate_size > 0"
        )
    return {"n_shared_experts": 0, "moe_shared_expert_intermediate_size": 0, "intermediate_size": 0}
