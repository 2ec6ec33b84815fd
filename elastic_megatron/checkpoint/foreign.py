"""Checkpoints of Megatron-LM and Megatron-Bridge: which folder is meant, and what it says of the model in it.

Both write ``torch_dist`` folders that have no ``elastic.json``. Megatron-LM keeps its parsed arguments in the common
state (an object among the shards, ``common.pt`` in older releases), Megatron-Bridge writes ``run_config.yaml``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.json_files import read_object
from ..files.reading import inside
from ..space import ParentShape
from ..space.parent import LAYER_FIELDS
from .common_state import GIVE_CONFIG, DistState, UnreadableError
from .dist_metadata import reading
from .manifest import Manifest
from .pickle_names import Attributes, Unknown
from .resolve import CONFIG, hf_shape
from .yaml_files import read_yaml

RUN_CONFIG = "run_config.yaml"
_SIZES = {**LAYER_FIELDS, "M": (*LAYER_FIELDS["M"], "mamba_chunk_size")}
# what a nemotron_h model computes, by Megatron's options: the values under which a Megatron model computes the same
_NUMERICS: Mapping[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm",),
    "activation_func": ("squared_relu",),
    "position_embedding_type": ("none",),
    "gated_linear_unit": (False,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False, None),
    "layernorm_zero_centered_gamma": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "activation_func_clamp_value": (None,),
    "qk_layernorm": (False, None),
    "qk_l2_norm": (False, None),
    "softmax_type": ("vanilla", None),
    "softmax_scale": (None,),
    "window_size": (None,),
    "attention_output_gate": (False, None),
    "multi_latent_attention": (False, None),
    "experimental_attention_variant": (None,),
    "heterogeneous_block_specs": (False, None),
    "use_mup": (False, None),
    "mtp_num_layers": (None, 0),
}
_NUMERICS_MOE: Mapping[str, tuple[Any, ...]] = {
    "moe_router_score_function": ("sigmoid",),
    "moe_router_enable_expert_bias": (True,),
    "moe_router_num_groups": (None, 1),
    "moe_router_topk_limited_devices": (None,),
    "moe_latent_size": (None, 0),
    "moe_shared_expert_gate": (False, None),
    "moe_apply_probs_on_input": (False, None),
    "moe_expert_capacity_factor": (None,),
}
# of a value: characters, and items of a list
_TEXT, _LIST = 10_000, 64
# lengths and tilings of a run, which no weight and no number depends on
_OF_THE_RUN = ("max_position_embeddings", "mamba_chunk_size")


def foreign_manifest(folder: Path, config: Path | None) -> Manifest:
    """What a folder of another program says of its model, or a Hugging Face config says instead.

    Args:
        config: the Hugging Face directory that the model came from, or its ``config.json``.

    Raises ``UserError`` where neither tells the sizes, the two contradict each other, or the model computes something
    that models of the Nemotron-H family do not.
    """
    if config is None:
        said = _read(folder)
        if said is None:
            raise UserError(f"{folder} says nothing about the model's sizes; {GIVE_CONFIG}")
        return Manifest(shape=said.shape())
    file = config / CONFIG if config.is_dir() else config
    hf_config = _hf_config(file)
    shape = hf_shape(hf_config, file)
    try:
        said = _read(folder)
    except UnreadableError:
        said = None  # the config says everything
    if said is not None:
        said.check(shape, config)
    return Manifest(shape=shape, hf_config=hf_config)


@dataclass(frozen=True)
class _Description:
    """What a checkpoint says of its model.

    Args:
        where: names it in messages.
        fields: under the names of Megatron's configs; functions by their name.
        metadata: what ``.metadata`` says.
    """

    where: str
    fields: Mapping[str, Any]
    metadata: DistState

    @cached_property
    def pattern(self) -> str:
        pattern = self.fields.get("hybrid_layer_pattern") or self.fields.get("hybrid_override_pattern")
        if not pattern or not isinstance(pattern, str):
            raise UserError(
                f"{self.where}: hybrid_layer_pattern is not set, so this is no hybrid model; only models of the "
                "Nemotron-H family can be exported"
            )
        return pattern.replace("|", "")  # bars cut it into pipeline stages

    def shape(self) -> ParentShape:
        self._refuse(complete=True)
        try:
            return ParentShape(vocab_size=self._vocab_size(), **self._sizes())
        except (TypeError, ValueError, UserError) as e:
            raise UserError(f"{self.where}: {e}; correct it, or {GIVE_CONFIG}") from None

    def check(self, shape: ParentShape, config: Path) -> None:
        """Raises ``UserError`` where a config contradicts it."""
        self._refuse(complete=False)
        for name, value in self._sizes().items():
            if name not in _OF_THE_RUN and value != getattr(shape, name):
                raise UserError(
                    f"{self.where}: {name} is {value!r}, but {config} says {getattr(shape, name)!r}; give the "
                    "config that this model came from"
                )

    def _refuse(self, *, complete: bool) -> None:
        numerics = {**_NUMERICS, **(_NUMERICS_MOE if "E" in self.pattern else {})}
        for name, legal in numerics.items():
            if name not in self.fields:
                if complete and None not in legal:
                    raise UserError(f"{self.where} says nothing about {name}; {GIVE_CONFIG}")
            elif self.fields[name] not in legal:
                raise UserError(
                    f"{self.where}: {name} is {self.fields[name]!r}, but models of the Nemotron-H family have "
                    f"{legal[0]!r}; such a model cannot be exported"
                )

    def _sizes(self) -> dict[str, Any]:
        """Fields of ``ParentShape``, those that are stated."""
        fields = self.fields
        names = [n for symbol, sizes in _SIZES.items() if symbol in self.pattern for n in sizes]
        stated: dict[str, Any] = {n: fields.get(n) for n in ("hidden_size", "layernorm_epsilon", *names)}
        stated["max_position_embeddings"] = fields.get("max_position_embeddings", fields.get("seq_length"))
        # where Megatron has None for a number
        if "E" in self.pattern and "moe_router_topk_scaling_factor" in fields:
            stated["moe_router_topk_scaling_factor"] = fields["moe_router_topk_scaling_factor"] or 1.0
        if "mamba_num_heads" in stated and stated["mamba_num_heads"] is None:
            sizes = stated["hidden_size"], stated["mamba_head_dim"]
            if not all(isinstance(size, int) and size > 0 for size in sizes):
                raise UserError(f"{self.where}: mamba_num_heads, hidden_size or mamba_head_dim is no size")
            stated["mamba_num_heads"] = 2 * sizes[0] // sizes[1]
        return {
            "hybrid_layer_pattern": self.pattern,
            "tie_embeddings": bool(fields.get("share_embeddings_and_output_weights")),
            **{n: v for n, v in stated.items() if v is not None},
        }

    def _vocab_size(self) -> int:
        """Without Megatron's padding, where it is stated; the tokenizer alone knows it otherwise."""
        rows, stated = self.metadata.rows, self.fields.get("vocab_size")
        multiples = ("make_vocab_size_divisible_by", "tensor_model_parallel_size")
        padding = prod(int(self.fields.get(n) or 1) for n in multiples)
        return stated if stated and stated <= rows < stated + padding else rows


def _read(folder: Path) -> _Description | None:
    metadata, file = DistState(folder), folder / RUN_CONFIG
    if os.path.lexists(file):
        return _Description(str(file), _of_bridge(inside(folder, RUN_CONFIG, folder)), metadata)
    common = metadata.common()
    args = common.get("args") if isinstance(common, dict) else None
    if not isinstance(args, Attributes):
        return None
    return _Description(f"{folder} (its arguments)", _of_arguments(_plain(args.fields)), metadata)


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What can be compared and shown: numbers, words and short lists of them; of the rest, that it is something else.

    A few bytes of a pickle or of YAML make lists of lists that never end.
    """
    return {name: _value(value) for name, value in fields.items() if isinstance(name, str)}


def _value(value: Any) -> Any:
    if isinstance(value, dict) and _is_scalar(
        name := value.get("_target_")
    ):  # a function, whatever package it is from
        return str(name).rsplit(".", 1)[-1]
    if isinstance(value, list | tuple) and len(value) <= _LIST and all(map(_is_scalar, value)):
        return value
    return value if _is_scalar(value) or isinstance(value, Unknown) else Unknown(type(value).__name__)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) < 1 << 63
    return value is None or isinstance(value, float) or (isinstance(value, str) and len(value) <= _TEXT)


def _of_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's arguments as fields of its configs."""
    swiglu, quick = args.get("swiglu"), args.get("quick_geglu")
    activation = "silu" if swiglu else "quick_gelu" if quick else "gelu"
    fields = {
        "layernorm_epsilon": args.get("norm_epsilon"),  # as older releases call it
        **args,
        "layernorm_zero_centered_gamma": any(
            args.get(n) for n in ("layernorm_zero_centered_gamma", "apply_layernorm_1p")
        ),
        "gated_linear_unit": bool(swiglu or quick),
        "activation_func": "squared_relu" if args.get("squared_relu") else activation,
        "share_embeddings_and_output_weights": not args.get("untie_embeddings_and_output_weights"),
        "num_moe_experts": args.get("num_experts"),
    }
    if not args.get("group_query_attention"):
        fields["num_query_groups"] = args.get("num_attention_heads")
    return fields


def _of_bridge(file: Path) -> dict[str, Any]:
    """Fields of the model's config, which a provider has itself and a config of models keeps in ``transformer``."""
    with reading(file, f"copy it again, or {GIVE_CONFIG}", UnreadableError):
        model = read_yaml(file)["model"]
        return _plain({**model, **(model.get("transformer") or {})})


def _hf_config(file: Path) -> dict[str, Any]:
    config = read_object(file, "give a Hugging Face model directory")
    if "quantization_config" in config:
        raise UserError(
            f"{file} is that of a quantised model; give the directory with the BF16 or FP32 weights"
        )
    return config
