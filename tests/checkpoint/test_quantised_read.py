"""Quantised directories are read as the numbers they stand for, or refused in one line that names what is odd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import write_hf
from hf_models import random_state, same, stored
from parity import megatron_logits
from quantised_dirs import SHAPE, describe, family, left_alone, pack
from safetensors.torch import save_file
from torch import Tensor

from elastic_megatron import runtime
from elastic_megatron.blocks import build_model
from elastic_megatron.checkpoint import dequantised as dequantised_module
from elastic_megatron.checkpoint.dequantised import dequantised
from elastic_megatron.checkpoint.hf_read import read_config, read_hf
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.resolve import hf_manifest
from elastic_megatron.checkpoint.source import open_source, open_stored
from elastic_megatron.conversion import Request, to_hf, to_megatron
from elastic_megatron.errors import UserError
from elastic_megatron.quantization.formats import FORMATS, NVFP4, Format

formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
UP = "backbone.layers.1.mixer.experts.3.up_proj"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("read")
    write_hf(root / "bf16", family(), random_state(SHAPE).items(), elastic=True, dtype=torch.bfloat16)
    for form in FORMATS.values():
        pack(root / "bf16", root / form.name, form)
    return root


def by_hand(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers of a quantised directory, value by value."""
    values = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype is torch.float8_e4m3fn and name.endswith(".weight"):
            found[name] = (tensor.float() * tensors[name + "_scale"]).bfloat16()
        elif tensor.dtype is torch.uint8:
            scales = tensors[name + "_scale"].float() * tensors[name + "_scale_2"]
            out = torch.empty(tensor.shape[0], 2 * tensor.shape[1])
            for r, row in enumerate(tensor.tolist()):
                codes = [c for byte in row for c in (byte & 15, byte >> 4)]
                line = [(-1 if c & 8 else 1) * values[c & 7] for c in codes]
                out[r] = torch.tensor(line) * scales[r].repeat_interleave(16)
            found[name] = out.bfloat16()
        elif "_scale" not in name:
            found[name] = tensor
    return found


@formats
def test_numbers_are_codes_times_scales(root: Path, tmp_path: Path, form: Format, monkeypatch: Any) -> None:
    """Rounded once to the dtype of the rest; in steps of a few rows too."""
    monkeypatch.setattr(dequantised_module, "_VALUES", 200)
    to_hf(dequantised(read_hf(root / form.name)), [Request(tmp_path / "numbers")])
    found, wanted = stored(tmp_path / "numbers"), by_hand(stored(root / form.name))
    assert found.keys() == wanted.keys()
    assert all(f.dtype is wanted[n].dtype and torch.equal(f, wanted[n]) for n, f in found.items())


@formats
def test_a_model_of_it_computes_what_one_of_its_numbers_computes(
    root: Path, tmp_path: Path, form: Format
) -> None:
    to_hf(dequantised(read_hf(root / form.name)), [Request(tmp_path / "numbers")])
    logits = []
    runtime.start(seed=1)
    tokens = torch.randint(0, 40, (2, 21), generator=torch.Generator().manual_seed(5))
    for folder in (root / form.name, tmp_path / "numbers", root / "bf16"):
        opened = open_source(folder)
        assert opened.manifest.shape == SHAPE
        model = build_model(SHAPE, dtype=torch.float32)
        opened.fill([model])
        logits.append(megatron_logits(model, tokens))
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


def test_an_import_holds_the_numbers_and_says_nothing_of_the_format(root: Path, tmp_path: Path) -> None:
    to_megatron(open_stored(root / "nvfp4"), tmp_path / "ck", verify=True)
    wanted = dequantised(read_hf(root / "nvfp4"))
    assert same(dict(open_stored(tmp_path / "ck").state()), dict(wanted.state()))
    assert "quantization_config" not in Manifest.read(tmp_path / "ck/iter_0000000/elastic.json").hf_config


def test_manifests_are_those_of_the_model_and_not_of_its_format(root: Path) -> None:
    elastic = Manifest.read(root / "bf16/elastic_config.json")
    assert read_hf(root / "nvfp4").manifest == elastic == hf_manifest(root / "nvfp4")
    assert dequantised(read_hf(root / "bf16")).quantised is None


@pytest.fixture
def nvfp4(root: Path, tmp_path: Path) -> Path:
    return pack(root / "bf16", tmp_path / "q", NVFP4)


def _quantization(**fields: object) -> Callable[[Path], None]:
    def change(d: Path) -> None:
        data = json.loads((d / "hf_quant_config.json").read_text())
        data["quantization"] |= fields
        (d / "hf_quant_config.json").write_text(json.dumps(data))

    return change


def _config(**fields: object) -> Callable[[Path], None]:
    def change(d: Path) -> None:
        data = json.loads((d / "config.json").read_text())
        data["quantization_config"] |= fields
        (d / "config.json").write_text(json.dumps(data))

    return change


def _both(algo: str) -> Callable[[Path], None]:
    def change(d: Path) -> None:
        _quantization(quant_algo=algo)(d)
        _config(quant_algo=algo)(d)

    return change


def _unlisted(module: str, remove: bool) -> Callable[[Path], None]:
    """Take a module out of both lists, or put it in."""

    def change(d: Path) -> None:
        names = json.loads((d / "hf_quant_config.json").read_text())["quantization"]["exclude_modules"]
        names = [n for n in names if n != module] if remove else [*names, module]
        _quantization(exclude_modules=names)(d)
        _config(ignore=names)(d)

    return change


def _tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(d: Path) -> None:
        tensors = stored(d)
        change(tensors)
        save_file(tensors, d / "model.safetensors")

    return apply


def _put(name: str, value: Tensor) -> Callable[[Path], None]:
    return _tensors(lambda t: t.update({name: value}))


def _without_config(d: Path) -> None:
    data = json.loads((d / "config.json").read_text())
    del data["quantization_config"]
    (d / "config.json").write_text(json.dumps(data))


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights only": (_both("W4A16_NVFP4"), r"by modelopt with quant_algo=W4A16_NVFP4; only FP8 and NVFP4 in ModelOpt's"),
    "mixed": (_both("MIXED_PRECISION"), r"quant_algo=MIXED_PRECISION; only"),
    "other tool": (_config(quant_method="fp8"), r"is quantised by fp8 with quant_algo=NVFP4"),
    "other algorithms": (_quantization(quant_algo="FP8"), r"says quant_algo=FP8, config\.json NVFP4"),
    "by layer": (_quantization(quantized_layers={"a": {}}), r"mixes formats by layer \(quantized_layers\)"),
    "cache": (_quantization(kv_cache_quant_algo="FP8"), r"quantises the key and value cache too \(FP8\)"),
    "other blocks": (_quantization(group_size=32), r"group_size 32; NVFP4 blocks have 16 columns"),
    "other bits": (
        _config(config_groups={"group_0": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}),
        r"NVFP4 with num_bits 8; 4 bits for weights and inputs",
    ),
    "other lists": (_quantization(exclude_modules=["lm_head"]), r"exclude different modules \('backbone"),
    "no list": (_quantization(exclude_modules="lm_head"), r"list of excluded modules that is none"),
    "no file": (lambda d: (d / "hf_quant_config.json").unlink(), r"hf_quant_config\.json is missing; .*NVFP4"),
    "empty file": (lambda d: (d / "hf_quant_config.json").write_text("{}"), r"json has no quantization; copy"),
    "no config": (_without_config, r"has hf_quant_config\.json, but config\.json has no quantization_config"),
    "no block scales": (_tensors(lambda t: t.pop(UP + ".weight_scale")), r"experts\.3\.up_proj\.weight_scale' is missing \(1 of"),
    "no global scale": (_tensors(lambda t: t.pop(UP + ".weight_scale_2")), r"up_proj\.weight_scale_2' is missing"),
    "no input scale": (_tensors(lambda t: t.pop(UP + ".input_scale")), r"up_proj\.input_scale' is missing"),
    "other scales": (
        _put(UP + ".weight_scale", torch.ones(64, 2, dtype=torch.float8_e4m3fn)),
        r"up_proj\.weight_scale' has shape \[64, 2\], the model's sizes say \[64, 4\]",
    ),
    "scale of blocks for all": (_put(UP + ".weight_scale_2", torch.ones(64)), r"weight_scale_2' has shape \[64\]"),
    "scales of another type": (
        _put(UP + ".weight_scale", torch.ones(64, 4)),
        r"up_proj\.weight_scale' has dtype float32, and the weight_scale of NVFP4 is float8_e4m3fn",
    ),
    "one weight as it was": (
        _put(UP + ".weight", torch.ones(64, 64, dtype=torch.bfloat16)),
        r"up_proj\.weight' has dtype bfloat16, and the weight of NVFP4 is uint8; where 'backbone.*up_proj' is not",
    ),
    "unpacked": (_put(UP + ".weight", torch.ones(64, 64, dtype=torch.uint8)), r"up_proj\.weight' has shape \[64, 64\]"),
    "excluded, and quantised": (_unlisted(UP, remove=False), r"experts\.3\.up_proj\..*scale.*' belongs to a weight that"),
    "not excluded, and not": (_unlisted("lm_head", remove=True), r"'lm_head\.weight' has dtype bfloat16, and the weight"),
    "half of one": (
        _unlisted("backbone.layers.3.mixer.k_proj", remove=True),
        r"excludes 'backbone\.layers\.3\.mixer\.q_proj' but not 'backbone\.layers\.3\.mixer\.k_proj', which are one",
    ),
    "packed embedding": (
        _put("backbone.embeddings.weight", torch.ones(40, 64, dtype=torch.uint8)), r"embeddings\.weight' has dtype uint8",
    ),
    "cache scales": (_put("backbone.layers.3.mixer.k_proj.k_scale", torch.ones(())), r"k_proj\.k_scale' belongs to no block"),
}  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_odd_directory(nvfp4: Path, odd: str) -> None:
    change, message = ODD[odd]
    read_hf(nvfp4)
    change(nvfp4)
    with pytest.raises(UserError, match=message) as error:
        read_hf(nvfp4)
    assert "\n" not in str(error.value)


def test_a_width_that_is_no_whole_blocks(tmp_path: Path) -> None:
    shape = SHAPE.override(moe_shared_expert_intermediate_size=40)
    write_hf(tmp_path / "m", Manifest(shape=shape), random_state(shape).items(), dtype=torch.bfloat16)
    linears = [
        "*.in_proj",
        "*.out_proj",
        "*.up_proj",
        "*.experts.?.down_proj",
        "backbone.layers.5.mixer.down_proj",
    ]
    describe(tmp_path / "m", read_config(tmp_path / "m"), NVFP4, [*left_alone(shape), *linears])
    for layer in (1, 4):
        _put(
            f"backbone.layers.{layer}.mixer.shared_experts.down_proj.weight",
            torch.ones(64, 20, dtype=torch.uint8),
        )(tmp_path / "m")
    with pytest.raises(
        UserError, match=r"down_proj\.weight' stands for 40 columns, and NVFP4 has blocks of 16"
    ):
        read_hf(tmp_path / "m")
