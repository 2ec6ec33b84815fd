"""Directories as people download them: what is written from them is true, and nothing of them goes in silence."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import write_hf
from hf_models import manifest, parent, random_state, same, stored
from quantised_dirs import SHAPE, left_alone, pack
from safetensors.torch import save_file
from torch import Tensor

from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.source import open_stored
from elastic_megatron.conversion import Report, Request, to_hf, to_megatron
from elastic_megatron.errors import UserError
from elastic_megatron.files.json_files import plain_numbers
from elastic_megatron.quantization.formats import NVFP4
from elastic_megatron.space import ParentShape

LARGEST = torch.finfo(torch.float32).max


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_hf(tmp_path / "m", Manifest(shape=parent()), random_state(parent()).items())
    (tmp_path / "m/README.md").unlink()
    return tmp_path / "m"


def stated(directory: Path) -> Any:
    """A directory's config, as a reader of RFC 8259 takes it."""

    def no(number: str) -> Any:
        raise AssertionError(f"{number} is no JSON")

    return json.loads((directory / "config.json").read_text(), parse_constant=no)


def state_also(directory: Path, **fields: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def rewritten(directory: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor] | None]) -> None:
    tensors = stored(directory)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, directory / "model.safetensors", {"format": "pt"})


def there_and_back(directory: Path) -> tuple[Path, list[str]]:
    """Imported, exported from the checkpoint, and cut directly: both alike. Returns one of them and what was said."""
    root = directory.parent
    said: list[Report] = [to_megatron(read_hf(directory), root / "c", verify=True)]
    said.append(to_hf(open_stored(root / "c"), [Request(root / "out")], verify=True))
    said.append(to_hf(read_hf(directory), [Request(root / "direct")], verify=True))
    assert _files(root / "out") == _files(root / "direct")
    assert stated(root / "out") == stated(root / "direct")
    assert said[0].notes == said[2].notes and not said[1].notes
    return root / "out", list(said[0].notes)


def _files(directory: Path) -> set[str]:
    return {str(f.relative_to(directory)) for f in directory.rglob("*") if f.is_file()}


@pytest.mark.parametrize(
    "infinity", [float("inf"), {"__float__": "Infinity"}], ids=["python", "transformers"]
)
def test_numbers_that_json_lacks_are_written_as_numbers(directory: Path, infinity: object) -> None:
    state_also(directory, time_step_limit=[0.0, infinity], odd=float("nan"), least=-float("inf"))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "penalty": infinity}))
    (directory / "tokenizer.json").write_text('{"vocab": {"Infinity":  7}}')
    out, _ = there_and_back(directory)
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 2, "penalty": LARGEST}
    assert (out / "tokenizer.json").read_text() == '{"vocab": {"Infinity":  7}}'
    config = stated(out)
    assert (config["time_step_limit"], config["odd"], config["least"]) == ([0.0, LARGEST], None, -LARGEST)
    written = (directory.parent / "c/iter_0000000/elastic.json").read_text()
    assert "Infinity" not in written and "NaN" not in written
    assert plain_numbers({"a": (1, {"__float__": [1]})}) == {"a": [1, {"__float__": [1]}]}


def test_layers_that_predict_more_tokens_are_left_out_and_not_stated(directory: Path) -> None:
    more = {"mtp.layers.0.norm.weight": torch.ones(16), "mtp.layers.0.eh_proj.weight": torch.ones(16, 32)}
    rewritten(directory, lambda t: t | more)
    state_also(
        directory, num_nextn_predict_layers=2, mtp_hybrid_override_pattern="*E", mtp_use_repeated_layer=True
    )
    out, [line] = there_and_back(directory)
    assert line.startswith("note: 2 tensors of multi-token prediction (mtp.*, 0.0 MB) are left out")
    config = stated(out)
    assert config["num_nextn_predict_layers"] == 0 and not [key for key in config if key.startswith("mtp")]
    assert not any(key.startswith("mtp") for key in stored(out))


@pytest.mark.parametrize("quantised", [False, True])
def test_names_that_other_releases_wrote_are_the_same_tensors(tmp_path: Path, quantised: bool) -> None:
    shape = SHAPE if quantised else parent()
    write_hf(tmp_path / "m", Manifest(shape=shape), random_state(shape).items(), max_shard_bytes=9000)
    named = {
        "prefix": lambda key: key.replace("backbone.", "model.", 1),
        "embedding": lambda key: key.replace("embeddings", "embedding"),
        "both": lambda key: key.replace("backbone.embeddings", "model.embedding").replace(
            "backbone.", "model.", 1
        ),
    }
    source = pack(tmp_path / "m", tmp_path / "q", NVFP4) if quantised else tmp_path / "m"
    wanted = stored(source)
    for name, rename in named.items():
        folder = tmp_path / name
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
        save_file({rename(k): t for k, t in wanted.items()}, folder / "odd.safetensors")
        where = {"weight_map": dict.fromkeys(map(rename, wanted), "odd.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(where))
        if quantised:
            for file in (folder / "hf_quant_config.json", folder / "config.json"):
                text = file.read_text()
                for module in left_alone(shape):
                    text = text.replace(f'"{module}"', f'"{rename(module)}"')
                file.write_text(text)
        to_hf(read_hf(folder), [Request(tmp_path / "out" / name)], verify=True)
        assert same(stored(tmp_path / "out" / name), wanted)
    save_file(wanted | {"model.embedding.weight": torch.ones(2)}, source / "model.safetensors")
    for index in source.glob("*.index.json"):
        index.unlink()
    with pytest.raises(
        UserError, match=r"'backbone\.embeddings\.weight' is in model\.safetensors and in .*; remove one"
    ):
        read_hf(source)


def test_every_file_is_copied_or_named(directory: Path) -> None:
    """An index keeps what is beside its shards out of the model; links are written as files."""
    copied = ["tokenizer.model", "chat_template.jinja", "additional_chat_templates/tool_use.jinja", "LICENSE",
              "generation_config.json", "preprocessor_config.json", "special_tokens_map.json"]  # fmt: skip
    named = [
        "README.md",
        "bias.md",
        "consolidated.safetensors",
        "nano_v3_reasoning_parser.py",
        "pytorch_model.bin",
    ]
    for name in (*copied, *named, ".gitattributes", "figures/a.png"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("{}")
    (directory / "model.safetensors").rename(directory / "odd name.safetensors")
    where = {
        "weight_map": dict.fromkeys(stored_names(directory / "odd name.safetensors"), "odd name.safetensors")
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(where))
    cache = directory.parent / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "abc"
    for file in [f for f in directory.rglob("*") if f.is_file()]:
        link = snapshot / file.relative_to(directory)
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(cache / "blobs" / file.name)
        link.symlink_to(os.path.relpath(cache / "blobs" / file.name, link.parent))
    out, [line] = there_and_back(snapshot)
    assert set(copied) <= _files(out) and not any(f.is_symlink() for f in out.rglob("*"))
    assert line == f"note: left out of {snapshot}: {', '.join(sorted([*named, 'figures']))}"
    assert _files(out) == {*copied, "README.md", "config.json", "model.safetensors"}
    assert set(copied) == _files(snapshot.parent / "c/iter_0000000/hf")


def stored_names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        return list(opened.keys())


def test_oddities_of_configurations(directory: Path) -> None:
    """A BOM, no architectures, ``dtype`` for ``torch_dtype``, fields that nobody knows, code of a repository."""
    config = stated(directory)
    del config["torch_dtype"], config["architectures"]
    config |= {
        "dtype": "float32",
        "quirk": {"a": [1]},
        "auto_map": {"AutoConfig": "owner/name--module.Class"},
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8-sig")
    out, [line] = there_and_back(directory)
    assert "auto_map names code for AutoConfig" in line
    found = stated(out)
    assert found["architectures"] == ["NemotronHForCausalLM"] and found["dtype"] == "float32"
    assert found["quirk"] == {"a": [1]} and not {"auto_map", "torch_dtype"} & found.keys()


def test_tensors_without_values_are_left_out(directory: Path) -> None:
    """transformers writes shared experts of width 0 so."""
    rewritten(
        directory, lambda t: t | {"backbone.layers.1.mixer.shared_experts.up_proj.bias": torch.ones(0, 16)}
    )
    out, [line] = there_and_back(directory)
    assert "1 tensors without values" in line and len(stored(out)) == len(stored(directory)) - 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.complex64, torch.float8_e5m2], ids=str)
def test_a_dtype_that_is_no_weights_is_named_with_its_tensor(directory: Path, dtype: torch.dtype) -> None:
    rewritten(directory, lambda t: t | {"lm_head.weight": t["lm_head.weight"].to(dtype)})
    with pytest.raises(
        UserError, match=rf"'lm_head.weight' has dtype {str(dtype)[6:]}; .*save the model with transf"
    ):
        read_hf(directory)


MISSING: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickles": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin.*are not read"),
    "no index": (
        lambda d: shutil.copy(
            (d / "model.safetensors").rename(d / "model-00001-of-00002.safetensors"),
            d / "model-00002-of-00002.safetensors",
        ),
        "has model-00001-of-00002.safetensors, but no model.safetensors.index.json.*small file",
    ),
    "nothing": (lambda d: (d / "model.safetensors").unlink(), "copy the weights"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISSING)
def test_weights_that_are_not_there_are_told_from_those_in_another_format(directory: Path, case: str) -> None:
    change, words = MISSING[case]
    change(directory)
    with pytest.raises(UserError, match=words) as caught:
        read_hf(directory)
    assert "copy it again" not in str(caught.value)


def test_shapes_without_an_elastic_part_are_still_parents(tmp_path: Path) -> None:
    """Whatever is left out of what is written can be read back."""
    shape: ParentShape = manifest().shape
    write_hf(tmp_path / "m", manifest(), random_state(shape).items(), elastic=True)
    assert read_hf(tmp_path / "m").notes == ()
