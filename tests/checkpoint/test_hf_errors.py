"""Bad directories, states and requests end in one line that says what, where and the remedy."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_files import slice_hf, write_hf
from hf_models import manifest, parent, random_state, stored
from safetensors.torch import save_file

from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.errors import UserError
from elastic_megatron.space import SubmodelSpec

SHARD = "model-00002-of-0000"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_hf(tmp_path / "m", manifest(), random_state(parent()).items(), max_shard_bytes=20_000)
    return tmp_path / "m"


def _shard(d: Path) -> Path:
    return next(d.glob(SHARD + "*"))


def _config(**fields: object) -> Callable[[Path], object]:
    def change(d: Path) -> None:
        config = json.loads((d / "config.json").read_text())
        (d / "config.json").write_text(json.dumps(config | fields))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    """Put all tensors into one file, changed."""

    def apply(d: Path) -> None:
        tensors = stored(d)
        change(tensors)
        for file in d.glob("model*"):
            file.unlink()
        save_file(tensors, d / "model.safetensors")

    return apply


def _index(change: Callable[[str], object], more: dict[str, str] | None = None) -> Callable[[Path], object]:
    """Name other files for the tensors."""

    def apply(d: Path) -> None:
        file = d / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"] = {t: change(n) for t, n in index["weight_map"].items()} | (more or {})
        file.write_text(json.dumps(index))

    return apply


def _moved(file: Path, elsewhere: Path) -> None:
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def _fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), r"config\.json is no valid JSON"),
    "list config": (lambda d: (d / "config.json").write_text("[]"), r"holds a list, not an object"),
    "other model": (_config(model_type="llama"), r"model_type is 'llama'; only 'nemotron_h'"),
    "unknown layer symbol": (
        _config(hybrid_override_pattern="MEM*EGM"),
        r"config\.json: hybrid_layer_pattern 'MEM\*EGM' has unknown layer symbols 'G'",
    ),
    "unknown layer type": (
        _config(layers_block_type=["mamba", "moe", "mamba", "attention", "moe", "gated_delta", "mamba"]),
        r"config\.json: layers_block_type has unknown layer types gated_delta; known are mamba,",
    ),
    "whole numbers": (
        _tensors(lambda t: t.update({"backbone.norm_f.weight": torch.ones(16, dtype=torch.int8)})),
        r"'backbone\.norm_f\.weight' has dtype int8; give the directory with the BF16, FP16 or FP32 weights",
    ),
    "quantised in silence": (
        _tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)})),
        r"'lm_head\.weight' has dtype float8_e4m3fn; give the directory",
    ),
    "latent experts": (_config(moe_latent_size=8), r"moe_latent_size=8"),
    "other activation": (_config(mlp_hidden_act="silu"), r"mlp_hidden_act='silu'"),
    "two patterns": (
        _config(layers_block_type=["mamba", "moe", "mamba", "attention", "moe", "mlp", "moe"]),
        r"contradicts itself: hybrid_override_pattern is 'MEM\*E-M', layers_block_type says 'MEM\*E-E'",
    ),
    "quantised": (_config(quantization_config={"quant_algo": "FP8"}), r"is quantised"),
    "no weights": (lambda d: [f.unlink() for f in d.glob("model*")], r"has neither model\.safetensors"),
    "no shard": (lambda d: _shard(d).unlink(), SHARD + r"\d\.safetensors is missing \(1 of"),
    "truncated": (lambda d: _shard(d).write_bytes(_shard(d).read_bytes()[:-9]), SHARD + r".*is truncated"),
    "empty shard": (lambda d: _shard(d).write_bytes(b""), SHARD + r".*is truncated"),
    "broken index": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), r"index\.json has no weight_map"),
    "shard elsewhere": (_index(lambda n: "../" + n), r"index\.json names '\.\./model-0.* is no file of its folder"),
    "absolute shard": (_index(lambda n: "/etc/passwd"), r"index\.json names '/etc/passwd'"),
    "shard no name": (_index(lambda n: 3), r"weight_map names no file for '"),
    "linked shard": (lambda d: [_moved(_shard(d), d.parent / "x")], SHARD + r".* leads out of .*put the file itself there"),
    "linked config": (lambda d: _moved(d / "config.json", d.parent / "x"), r"config\.json leads out of"),
    "piped index": (lambda d: _fifo(d / "model.safetensors.index.json"), r"index\.json is a FIFO"),
    "piped shard": (lambda d: _fifo(_shard(d)), SHARD + r".*is a FIFO"),
    "other shard": (_index(lambda n: n.replace("00002-of", "00001-of")), r"says that model-00001-of-\d+\.safetensors holds"),
    "promised tensor": (
        _index(lambda n: n, {"backbone.more": "model-00001-of-00004.safetensors"}),
        r"index\.json says that model-00001-of-00004\.safetensors holds 'backbone\.more', and it does not \(1 such",
    ),
    "no tensor": (_tensors(lambda t: t.pop("backbone.layers.0.mixer.D")), r"'backbone\.layers\.0\.mixer\.D' is missing \(1"),
    "no head": (_tensors(lambda t: t.pop("lm_head.weight")), r"'lm_head\.weight' is missing"),
    "unknown tensor": (
        _tensors(lambda t: t.update({"backbone.layers.0.mixer.in_proj.bias": torch.ones(2)})),
        r"'backbone\.layers\.0\.mixer\.in_proj\.bias' belongs to no block",
    ),
    "next layer": (
        _tensors(lambda t: t.update({"backbone.layers.7.norm.weight": torch.ones(16)})),
        r"'backbone\.layers\.7\.norm\.weight' belongs to no block",
    ),
    "wrong shape": (
        _tensors(lambda t: t.update({"backbone.norm_f.weight": torch.ones(15)})),
        r"'backbone\.norm_f\.weight' has shape \[15\], the model's sizes say \[16\]",
    ),
    "other sizes": (_config(moe_intermediate_size=10), r"up_proj\.weight' has shape \[12, 16\].*say \[10, 16\]"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_directory(directory: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    read_hf(directory)
    change(directory)
    with pytest.raises(UserError, match=message) as error:
        read_hf(directory)
    assert "\n" not in str(error.value)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent is no directory"):
        read_hf(tmp_path / "absent")


def test_damaged_elastic_config(directory: Path) -> None:
    (directory / "elastic_config.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match=r"elastic_config\.json has format_version 99"):
        read_hf(directory)


def test_tied_model_with_another_head(tmp_path: Path) -> None:
    shape = parent(tie_embeddings=True)
    write_hf(tmp_path / "m", Manifest(shape=shape), random_state(shape).items())
    _tensors(lambda t: t["lm_head.weight"].add_(1))(tmp_path / "m")
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embedding"):
        list(read_hf(tmp_path / "m").state())


def test_requests_that_cannot_be_met(tmp_path: Path, directory: Path) -> None:
    source, state = manifest(), list(random_state(parent()).items())
    uneven = source.submodels["small"].to_dict() | {"mamba_num_heads": [2, 6, 6]}
    mixed = replace(source, submodels={"mixed": SubmodelSpec.of(uneven)})
    cases: list[tuple[Path, Manifest, dict[str, object], str]] = [
        (directory, source, {}, "m already exists and is not empty"),
        (directory / "config.json", source, {}, "config.json already exists"),
        (tmp_path / "x", source, {"submodel": "tiny"}, "unknown submodel 'tiny'; .* large, middle, small"),
        (tmp_path / "x", mixed, {"submodel": "mixed"}, "mamba_num_heads differs between layers"),
        (tmp_path / "x", Manifest(shape=parent()), {"elastic": True}, "not elastic.*no elastic_config.json"),
        (tmp_path / "x", source, {"elastic": True, "plain_order": True}, "choose one"),
    ]
    for target, described, options, message in cases:
        with pytest.raises(UserError, match=message):
            write_hf(target, described, state, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_slicing_a_plain_directory(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("has no elastic_config.json")):
        slice_hf(directory, tmp_path / "s", "small")


def test_all_names_are_checked_before_the_first_slice_is_written(tmp_path: Path) -> None:
    write_hf(tmp_path / "p", manifest(), random_state(parent()).items(), elastic=True)
    with pytest.raises(UserError, match="unknown submodel 'tiny'"):
        slice_hf(tmp_path / "p", tmp_path / "s", ["small", "tiny"])
    assert not (tmp_path / "s").exists()


def test_dense_layers_beside_experts_need_shared_experts(tmp_path: Path) -> None:
    shape = parent(hybrid_layer_pattern="E-", moe_shared_expert_intermediate_size=0)
    with pytest.raises(UserError, match="needs shared experts"):
        write_hf(tmp_path / "m", Manifest(shape=shape), random_state(shape).items())
