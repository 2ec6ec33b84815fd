"""``verify`` shares no code with what it verifies: a fault of any reader, cutter or writer is told, in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import write_hf
from hf_models import manifest, parent, random_state, stored
from quantised_dirs import SHAPE, family, pack
from safetensors.torch import save_file
from torch import Tensor

from elastic_megatron.checkpoint import libraries
from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.checkpoint.raw import RawFiles
from elastic_megatron.checkpoint.stored import StoredModel
from elastic_megatron.checkpoint.torch_dist import DistFiles, open_torch_dist
from elastic_megatron.conversion import Request, copy, hf_target, megatron_target, to_hf, to_megatron
from elastic_megatron.conversion.safetensors_shards import SafetensorsShards
from elastic_megatron.errors import UserError
from elastic_megatron.quantization.formats import NVFP4
from elastic_megatron.space import SubmodelSpec

Patch = pytest.MonkeyPatch


def swapped(rows: Tensor) -> Tensor:
    """The same rows, two of them exchanged; in place."""
    if len(rows) > 1:
        rows[[0, 1]] = rows[[1, 0]]
    return rows


def after(patch: Patch, owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Change what a function gives, by its arguments and what it gave."""
    whole = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: change(whole(*args, **kwargs), *args))


def first_dtype(patch: Patch) -> None:
    """The dtype of the first piece for all of them: what once went unnoticed."""
    patch.setattr(StoredModel, "dtype", lambda self, t: next(iter(self.dtypes(t).values())))
    patch.setattr(StoredModel, "_read", lambda self, key, start, out: self.files.read(key, start, out))


def written_elsewhere(patch: Patch) -> None:
    write = SafetensorsShards.write

    def late(self: SafetensorsShards, key: str, start: int, rows: Tensor) -> None:
        write(self, key, start, rows.roll(1, 0))

    patch.setattr(SafetensorsShards, "write", late)


FAULTS: dict[str, Callable[[Patch], object]] = {
    "bytes of a file": lambda p: after(p, RawFiles, "read", lambda _, self, file, at, out: swapped(out)),
    "rows of a tensor": lambda p: after(p, StoredModel, "rows", lambda rows, *_: swapped(rows)),
    "dtype of a tensor": first_dtype,
    "a row that is cut": lambda p: after(p, copy, "_take", lambda rows, *_: swapped(rows.clone())),
    "a dtype that is converted": lambda p: after(
        p, copy, "_convert", lambda rows, *_: torch.zeros_like(rows)
    ),
    "a row that is written": written_elsewhere,
}
TO_CHECKPOINT = ("bytes of a file", "rows of a tensor", "dtype of a tensor")


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """An elastic directory whose k and v have another dtype than q."""
    write_hf(tmp_path / "m", manifest(), random_state(parent(), dtype=torch.bfloat16).items(), elastic=True)
    tensors = {
        k: t.float() if ".k_proj" in k or ".v_proj" in k else t for k, t in stored(tmp_path / "m").items()
    }
    save_file(tensors, tmp_path / "m/model.safetensors", {"format": "pt"})
    return tmp_path / "m"


def told(words: str, convert: Callable[[], object], target: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        convert()
    assert "\n" not in str(caught.value) and not target.exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_between_directories_is_told(
    mixed: Path, tmp_path: Path, monkeypatch: Patch, fault: str
) -> None:
    to_hf(read_hf(mixed), [Request(tmp_path / "right", "small")], verify=True)
    FAULTS[fault](monkeypatch)
    requests = [Request(tmp_path / "out", "small")]
    told(
        "differs from its source in rows",
        lambda: to_hf(read_hf(mixed), requests, verify=True, allow_nonfinite=True),
        tmp_path / "out",
    )


@pytest.mark.parametrize("fault", TO_CHECKPOINT)
def test_a_fault_on_the_way_to_a_checkpoint_is_told(
    mixed: Path, tmp_path: Path, monkeypatch: Patch, fault: str
) -> None:
    to_megatron(read_hf(mixed), tmp_path / "right", verify=True)
    FAULTS[fault](monkeypatch)
    told(
        "differs from its source in rows",
        lambda: to_megatron(read_hf(mixed), tmp_path / "out", verify=True, allow_nonfinite=True),
        tmp_path / "out",
    )


@pytest.mark.parametrize("fault", ["bytes of a file", "rows of a tensor", "a row that is written"])
def test_a_fault_on_the_way_from_a_checkpoint_is_told(
    mixed: Path, tmp_path: Path, monkeypatch: Patch, fault: str
) -> None:
    to_megatron(read_hf(mixed), tmp_path / "c")
    source = open_torch_dist(tmp_path / "c/iter_0000000", read_hf(mixed).manifest, None)
    source = replace(source, files=DistFiles(source.path))  # no place of values is remembered
    to_hf(source, [Request(tmp_path / "right")], verify=True)
    FAULTS[fault](monkeypatch)
    source = replace(source, files=source.files)
    told("differs", lambda: to_hf(source, [Request(tmp_path / "out")], verify=True), tmp_path / "out")


def tensors_changed(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = stored(folder)
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return apply


HEAD = "lm_head.weight"
CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (tensors_changed(lambda t: t.pop(HEAD)), "'lm_head.weight' is absent when read back"),
    "extra": (tensors_changed(lambda t: t.update(more=torch.ones(2))), r"'more' \[2\] of float32 when read back"),
    "dtype": (tensors_changed(lambda t: t.update({HEAD: t[HEAD].float()})), "float32 when read back, and should be"),
    "shape": (tensors_changed(lambda t: t.update({HEAD: t[HEAD].T.contiguous()})), HEAD),
    "no JSON": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("1e-30", "Infinity")),
        "holds Infinity, which is no JSON",
    ),
    "no family": (lambda f: (f / "elastic_config.json").unlink(), "elastic_config.json is missing"),
}  # fmt: skip


def complete_then(monkeypatch: Patch, change: Callable[[Path], object]) -> None:
    after(monkeypatch, hf_target, "_complete", lambda _, folder, *__: change(folder))


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_missing_or_too_much_is_told(
    mixed: Path, tmp_path: Path, monkeypatch: Patch, change: str
) -> None:
    apply, words = CHANGES[change]
    complete_then(monkeypatch, apply)
    requests = [Request(tmp_path / "out", elastic=True)]
    told(words, lambda: to_hf(read_hf(mixed), requests, verify=True), tmp_path / "out")


def test_every_number_of_a_configuration_is_compared(mixed: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """Of what ``nemotron_h`` computes, each field changed in turn."""
    source, shape = read_hf(mixed), parent()
    fields = {
        k: v
        for k, v in shape.to_hf().items()
        if k not in ("expand", "num_hidden_layers", "layers_block_type")
    }
    for field, value in {**fields, "torch_dtype": "bfloat16", "mlp_hidden_act": "relu2"}.items():
        wrong = "silu" if isinstance(value, str) else not value if isinstance(value, bool) else value * 2
        wrong = "MEM*EM-" if field == "hybrid_override_pattern" else wrong

        def change(folder: Path, field: str = field, wrong: object = wrong) -> None:
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {field: wrong}))

        with monkeypatch.context() as patch:
            complete_then(patch, change)
            told(
                "config.json (says|states)",
                lambda: to_hf(source, [Request(tmp_path / "out")], verify=True),
                tmp_path / "out",
            )
        # what is written as it was planned, and planned wrongly; nothing of the model says whether experts are shared
        with monkeypatch.context() as patch:
            after(patch, hf_target, "hf_config", lambda c, *_, f=field, w=wrong: c | {f: w})
            if field not in ("n_shared_experts", "torch_dtype"):
                told(
                    "config.json (says|states)",
                    lambda: to_hf(source, [Request(tmp_path / "out")], verify=True),
                    tmp_path / "out",
                )


def test_sizes_of_single_layers_are_compared(tmp_path: Path, monkeypatch: Patch) -> None:
    source = manifest()
    widths = source.submodels["small"].to_dict() | {"num_moe_experts": [4, 6], "num_layers": 6}
    source = replace(source, submodels={"mixed": SubmodelSpec.of(widths)})
    write_hf(tmp_path / "right", source, random_state(parent()).items(), submodel="mixed", verify=True)

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["block_configs"][1]["n_routed_experts"] = 6
        (folder / "config.json").write_text(json.dumps(config))

    complete_then(monkeypatch, change)
    told(
        "of layer 1, and it has",
        lambda: write_hf(
            tmp_path / "out", source, random_state(parent()).items(), submodel="mixed", verify=True
        ),
        tmp_path / "out",
    )


def test_a_checkpoint_that_lacks_a_tensor_is_told(mixed: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    write = megatron_target.write_torch_dist
    monkeypatch.setattr(
        megatron_target, "write_torch_dist", lambda f, tensors, *a, **k: write(f, tensors[1:], *a, **k)
    )
    told(
        "'embedding.word_embeddings.weight' is absent",
        lambda: to_megatron(read_hf(mixed), tmp_path / "out", verify=True),
        tmp_path / "out",
    )


def test_quantised_numbers_are_read_again_below_their_arithmetic(tmp_path: Path, monkeypatch: Patch) -> None:
    """Codes and scales of a directory come through the library, also where numbers are made of them."""
    write_hf(tmp_path / "m", family(), random_state(SHAPE, dtype=torch.bfloat16).items(), elastic=True)
    pack(tmp_path / "m", tmp_path / "q", NVFP4)
    to_hf(read_hf(tmp_path / "q"), [Request(tmp_path / "right", "middle")], verify=True)
    to_megatron(read_hf(tmp_path / "q"), tmp_path / "c", verify=True)
    FAULTS["bytes of a file"](monkeypatch)
    request = [Request(tmp_path / "out", "middle")]
    told("differs", lambda: to_hf(read_hf(tmp_path / "q"), request, verify=True), tmp_path / "out")
    told("differs", lambda: to_megatron(read_hf(tmp_path / "q"), tmp_path / "d", verify=True), tmp_path / "d")


def test_mappings_are_closed_and_few_tensors_kept(mixed: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """What verifying holds is a mapping for each thread and two tensors of a checkpoint, whatever the model."""
    opened = [0]
    safe_open = libraries.safe_open

    def counted(*args: Any, **kwargs: Any) -> Any:
        opened[0] += 1
        return safe_open(*args, **kwargs)

    monkeypatch.setattr(libraries, "safe_open", counted)
    monkeypatch.setattr(libraries, "_MAPPED", 2000)
    to_megatron(read_hf(mixed), tmp_path / "c", verify=True)
    total = sum(t.nbytes for t in stored(mixed).values())
    assert opened[0] >= total // (2000 + 16 * 40 * 2)
    files = libraries.LibraryTorchDist(tmp_path / "c/iter_0000000")
    for key, entry in files.entries.items():
        files.read(key, 0, torch.empty(entry.shape, dtype=entry.dtype))
        assert len(files._whole) <= 2
