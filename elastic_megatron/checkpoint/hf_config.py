"""``config.json`` of an exported model: the parent's, with only the sliced fields changed.

A model of equal layers is a ``nemotron_h``. One whose MoE or dense layers differ in width is a ``nemotron_h_puzzle``,
read in the sources of its loaders and not run in them: ``block_configs`` states each layer, as a ``block_type`` and the
``nemotron_h`` fields that are its own. vLLM (vllm/model_executor/models/nemotron_h.py, PRs 32549 and 35396) builds
MoE, dense and attention layers from ``get_nemotron_h_config_for_layer`` of the config, Mamba layers, and their caches,
from the model's fields; it has no config class of its own and takes the one that ``auto_map`` names. SGLang
(python/sglang/srt/configs/nemotron_h.py and models/nemotron_h.py) has one, reads MoE and attention layers by it, and
one dense width. Released models of that type (Megatron-Bridge's nemotron_h_puzzle_bridge.py) vary expert width and
top-k; per-layer head counts are stated by none of them and refused here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files.json_files import plain_numbers
from ..space import AXIS_NAMES, ParentShape, axis
from .manifest import Manifest
from .side_files import own_code

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


BLOCK_TYPES = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
# second names of a field that transformers takes in place of the first; a stale one would win
_SYNONYMS = {
    "mamba_expand": "expand",
    "num_local_experts": "n_routed_experts",
    "layer_types": "layers_block_type",
}
_PER_LAYER = {
    "num_moe_experts": "E",
    "moe_ffn_hidden_size": "E",
    "moe_shared_expert_intermediate_size": "E",
    "ffn_hidden_size": "-",
}
# of multi-token prediction, whose tensors are not carried; the rest of it is in fields ``mtp_*``
_PREDICTED = "num_nextn_predict_layers"
_PUZZLE_MODULE = "configuration_nemotron_h_puzzle"


def hf_config(
    manifest: Manifest,
    shape: ParentShape,
    code: Collection[str],
    layer_sizes: Mapping[int, Mapping[str, int]] | None = None,
) -> dict[str, Any]:
    """The ``config.json`` of ``shape``, a submodel (or the whole) of the manifest's model.

    Where the manifest has no config of a parent, it is a complete one with the options of the family.

    Args:
        shape: where layers differ, the largest sizes.
        code: the files of Python that the directory gets; what ``auto_map`` names elsewhere, as in a repository of
            the hub, is code of another model's, and loaders have the architecture built in.
        layer_sizes: for each layer of ``shape`` that differs from it, the sizes that do.

    Raises ``UserError`` for a shape that loaders cannot be told of.
    """
    before, sizes, base = manifest.shape.to_hf(), shape.to_hf(), dict(manifest.hf_config)
    base = base or {**_COMPLETE, **before, "layers_block_type": None}
    changed = {k: v for k, v in sizes.items() if k not in base or before.get(k) != v}
    config = base | changed | {"time_step_min": NO_CLAMP}
    config |= {other: config[f] for other, f in _SYNONYMS.items() if other in config and f in changed}
    stale = set()
    if shape != manifest.shape and "expand" not in sizes:
        # no whole number, and transformers takes no other; it reads the head sizes instead
        stale.add("expand")
    if base.get("layers_block_type") != before["layers_block_type"]:
        # hybrid_override_pattern says the same to every loader; beside it, transformers refuses the spellings from
        # before 5.14, SGLang those since then, and in remote code that lacks the list it has no setter
        stale.add("layers_block_type")
    config = {k: v for k, v in config.items() if _SYNONYMS.get(k, k) not in stale}
    config = {
        k: v for k, v in config.items() if k not in ("auto_map", _PREDICTED) and not k.startswith("mtp_")
    }
    if own := own_code(base, code):
        config["auto_map"] = own
    if _PREDICTED in base:
        config[_PREDICTED] = 0
    config["architectures"] = config.get("architectures") or _COMPLETE["architectures"]
    config = plain_numbers(config) | _for_every_engine(base, manifest.shape, shape)
    return config | _no_shared_experts(shape) | _own_layers(manifest, shape, layer_sizes or {})


def code_files(config: Mapping[str, Any]) -> dict[str, Path]:
    """The files of this package that a directory with this config needs, by the names they get there."""
    if "block_configs" not in config:
        return {}
    return {f"{_PUZZLE_MODULE}.py": Path(__file__).with_name("hf_layers.py")}


def with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config with the dtype that loaders choose by default, under the spelling(s) it has already."""
    name = str(dtype).removeprefix("torch.")
    spellings = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return {**config, **dict.fromkeys(spellings, name)}


def _for_every_engine(base: Mapping[str, Any], before: ParentShape, shape: ParentShape) -> dict[str, Any]:
    """Fields that transformers does without and others do not (docs/engines.md)."""
    pattern, out = shape.hybrid_layer_pattern, dict[str, Any]()
    if "M" in pattern:
        out["mamba_n_groups"] = (
            shape.mamba_num_groups
        )  # SGLang's model, whose default is 8; its caches read n_groups
    if "E" in pattern:
        # vLLM and SGLang multiply the shared experts' width by it, transformers and mlx-lm do not
        out["n_shared_experts"] = int(shape.moe_shared_expert_intermediate_size > 0)
    if "-" not in pattern:  # mlx-lm insists; released models without dense layers repeat the experts' width
        stated = base.get("intermediate_size")
        follows = stated in (None, before.moe_ffn_hidden_size)
        out["intermediate_size"] = shape.moe_ffn_hidden_size if follows else stated
    return out


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


def _own_layers(
    manifest: Manifest, shape: ParentShape, layer_sizes: Mapping[int, Mapping[str, int]]
) -> dict[str, Any]:
    """Fields that state layers of different width; none where they do not differ.

    Raises ``UserError`` for an axis that no loader reads by layer.
    """
    own = {i: {a: n for a, n in sizes.items() if n != getattr(shape, a)} for i, sizes in layer_sizes.items()}
    differing = [a for a in AXIS_NAMES if any(a in sizes for sizes in own.values())]
    if refused := [a for a in differing if a not in _PER_LAYER]:
        raise UserError(
            f"{', '.join(refused)} differs between layers, which no loader of nemotron_h models can be told; "
            f"choose a submodel with equal widths ({_equal_widths(manifest)}), or train without space.per_layer "
            f"for {', '.join(refused)}"
        )
    if not differing:
        return {}
    blocks: list[dict[str, Any]] = []
    for layer, symbol in enumerate(shape.hybrid_layer_pattern):
        sizes = {
            a: own.get(layer, {}).get(a, getattr(shape, a)) for a, s in _PER_LAYER.items() if s == symbol
        }
        top_k = {"num_experts_per_tok": shape.moe_router_topk} if symbol == "E" else {}
        blocks.append(
            {"block_type": BLOCK_TYPES[symbol], **{axis(a).hf: n for a, n in sizes.items()}, **top_k}
        )
    return {
        "model_type": "nemotron_h_puzzle",
        "architectures": ["NemotronHPuzzleForCausalLM"],
        "auto_map": {"AutoConfig": f"{_PUZZLE_MODULE}.NemotronHPuzzleConfig"},
        "block_configs": blocks,
    }


def _equal_widths(manifest: Manifest) -> str:
    space = manifest.space
    names = [n for n, spec in manifest.submodels.items() if space is None or not space.differing(spec)]
    return f"this family has: {', '.join(names)}" if names else "this family has none"
