"""Quantised directories as ModelOpt writes them, made from BF16 ones by name and the slow way."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from hf_models import stored
from safetensors.torch import save_file
from torch import Tensor

from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.quantization.formats import INPUT_SCALE, NVFP4, Format
from elastic_megatron.quantization.packing import quantise
from elastic_megatron.space import ElasticSpace, ParentShape, SubmodelSpec

# every axis elastic; whole blocks of 16 columns in every lane
SHAPE = ParentShape(
    "MEM*E-M", 64, 40, ffn_hidden_size=64, moe_ffn_hidden_size=64, moe_shared_expert_intermediate_size=48,
    num_moe_experts=8, moe_router_topk=2, moe_router_topk_scaling_factor=2.5, mamba_num_heads=8, mamba_head_dim=32,
    mamba_state_dim=16, mamba_num_groups=2, num_attention_heads=8, num_query_groups=2, kv_channels=16,
    mamba_chunk_size=16,
)  # fmt: skip
CHOICES: dict[str, list[int]] = {
    "hidden_size": [48, 32], "num_layers": [6, 4], "ffn_hidden_size": [32], "moe_ffn_hidden_size": [32],
    "moe_shared_expert_intermediate_size": [32, 16], "num_moe_experts": [6, 4], "mamba_num_heads": [4],
    "mamba_head_dim": [16], "mamba_state_dim": [8], "num_attention_heads": [4],
}  # fmt: skip
LANES = {"num_moe_experts": 2, "moe_ffn_hidden_size": 2, "ffn_hidden_size": 2}
# a smaller one, for programs of others
EXPORTED = SHAPE.override(hybrid_layer_pattern="MEM*E", ffn_hidden_size=0, num_moe_experts=6)
_LINEARS = re.compile(
    r"(.*\.mixer\.(?:in_proj|out_proj|[qkvo]_proj|(?:experts\.\d+\.|shared_experts\.)?(?:up|down)_proj)|lm_head)\.weight"
)
Amax = Callable[[str, Tensor], tuple[Tensor, Tensor]]


def family(
    shape: ParentShape = SHAPE, choices: Mapping[str, list[int]] = CHOICES, lanes: bool = True
) -> Manifest:
    """Each choice of each axis as a submodel, besides the whole, all of them smallest, and a mixture."""
    order = [3, 1, 0, 6, 4, 2, 5] if shape.num_layers == 7 else ()
    own = {a: [n for n in w if n < shape.size(a)] for a, w in choices.items() if shape.size(a)}
    own = {a: w for a, w in own.items() if w}
    dealt = {a: n for a, n in LANES.items() if a in own} if lanes else {}
    space = ElasticSpace.build(shape, own, dealt, layer_order=order)
    whole = space.full().to_dict()
    submodels = {f"{a}={w}": SubmodelSpec.of(whole | {a: w}) for a, widths in own.items() for w in widths}
    middle = SubmodelSpec.of({a: (space.choices_of(a)[1]) for a in space.axes})
    ends = {"whole": space.full(), "middle": middle, "smallest": space.smallest()}
    return Manifest(shape=shape, space=space, submodels=submodels | ends)


def left_alone(shape: ParentShape) -> list[str]:
    """Modules of the official Nemotron 3 Nano checkpoints: attention, the Mamba layers that feed it, and the ends."""
    pattern, found = shape.hybrid_layer_pattern, ["backbone.embeddings"]
    for i, symbol in enumerate(pattern):
        mixer = f"backbone.layers.{i}.mixer"
        if symbol == "M":
            found += [f"{mixer}.conv1d"]
            found += [f"{mixer}.in_proj", f"{mixer}.out_proj"] if pattern[i + 1 : i + 2] == "*" else []
        found += [f"{mixer}.{p}_proj" for p in "qkvo"] if symbol == "*" else []
        found += [f"{mixer}.gate"] if symbol == "E" else []
    return sorted([*found, "lm_head"])


def largest(key: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Max calibration: of the weight, and of some activations that differ from linear to linear."""
    return weight.abs().max(), torch.tensor(1 + crc32(key.encode()) % 97 / 7)


def bits(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """Tensors to be compared bit by bit."""
    return {
        n: (t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for n, t in tensors.items()
    }


def pack(
    source: Path, destination: Path, form: Format, exclude: list[str] | None = None, amax: Amax = largest
) -> Path:
    """Quantise every linear of a directory whose module is not excluded by name."""
    from elastic_megatron.checkpoint.hf_read import read_config
    from elastic_megatron.checkpoint.resolve import hf_shape

    config = read_config(source)
    exclude = left_alone(hf_shape(config, source)) if exclude is None else exclude
    tensors: dict[str, Tensor] = {}
    for key, tensor in stored(source).items():
        if not _LINEARS.fullmatch(key) or key.removesuffix(".weight") in exclude:
            tensors[key] = tensor
            continue
        for suffix, part in quantise(form, tensor, *amax(key, tensor)).items():
            # ModelOpt's exporter: numbers are [], but inputs of FP8 [1]
            one = suffix == INPUT_SCALE and form is not NVFP4
            tensors[key.removesuffix("weight") + suffix] = part.reshape(1) if one else part.clone()
    shutil.copytree(source, destination, ignore=shutil.ignore_patterns("*.safetensors*", "README.md"))
    save_file(tensors, destination / "model.safetensors", {"format": "pt"})
    describe(destination, config, form, exclude)
    return destination


def describe(directory: Path, config: Mapping[str, Any], form: Format, exclude: list[str]) -> None:
    """``hf_quant_config.json`` and ``quantization_config``, as ModelOpt 0.47 writes them."""
    producer = {"name": "modelopt", "version": "0.47.0"}
    group = {"group_size": form.block} if form is NVFP4 else {}
    numbers = {"dynamic": False, "num_bits": form.bits, "type": "float", **group}
    quantization = {"quant_algo": form.algo, "exclude_modules": exclude, **group}
    (directory / "hf_quant_config.json").write_text(
        json.dumps({"producer": producer, "quantization": quantization}, indent=4)
    )
    entry = {
        "config_groups": {"group_0": {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}},
        "ignore": exclude, "quant_algo": form.algo, "producer": producer, "quant_method": "modelopt",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": entry}, indent=2))


def origin(space: ElasticSpace, spec: SubmodelSpec) -> Callable[[str], str]:
    """Where a tensor of a submodel was cut from, by name: layers and experts have other numbers there."""
    layers = space.kept_layers(spec)

    def of(key: str) -> str:
        name = re.sub(r"layers\.(\d+)", lambda m: f"layers.{layers[int(m[1])]}", key)
        if ".experts." not in name:
            return name
        layer = layers[int(key.split(".")[2])]
        kept = space.kept("num_moe_experts", space.layer_sizes(spec, layer)["num_moe_experts"])
        return re.sub(r"experts\.(\d+)", lambda m: f"experts.{kept[int(m[1])]}", name)

    return of


def parents_amax(parent: Path, space: ElasticSpace, spec: SubmodelSpec) -> Amax:
    """What ``largest`` says of the weights of an unquantised directory, for the names of a submodel of it."""
    weights, of = stored(parent), origin(space, spec)
    return lambda key, _: largest(of(key), weights[of(key)])
