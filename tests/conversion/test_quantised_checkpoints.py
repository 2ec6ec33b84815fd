"""Law 8 from training on: what is exported of a quantised checkpoint is what training multiplied with, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hf_files import slice_hf
from hf_models import same, stored
from quantised_checkpoints import Trained, train
from quantised_dirs import SHAPE, bits, family, left_alone, origin, pack

from elastic_megatron.checkpoint import packed
from elastic_megatron.checkpoint.dequantised import dequantised
from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.source import open_stored
from elastic_megatron.conversion import Request, copy, to_hf, to_megatron, weights_bytes
from elastic_megatron.errors import UserError
from elastic_megatron.files.json_files import read_object
from elastic_megatron.quantization.formats import FORMATS, NVFP4, Format
from elastic_megatron.quantization.packing import fake_quantise

FAMILY = family()
formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


@dataclass(frozen=True)
class Exported:
    """A checkpoint, its elastic directory, slices of that, its own slices, and slices of what training updates."""

    trained: Trained
    root: Path

    @property
    def elastic(self) -> Path:
        return self.root / "elastic"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    found = {}
    for form in FORMATS.values():
        root = tmp_path_factory.mktemp(form.name)
        trained = train(root / "run", form)
        # parts of a weight are read in stretches of rows that are none of the other's
        with (
            patch.object(packed, "_VALUES", 500),
            patch.object(copy, "TILE", 1500),
            patch.object(copy, "_GAP", 0),
        ):
            to_hf(open_stored(root / "run"), [Request(root / "elastic", elastic=True)], verify=True)
            own = [Request(root / "own" / name, name, elastic=True) for name in FAMILY.submodels]
            to_hf(open_stored(root / "run"), own)
        slice_hf(root / "elastic", root / "slices", list(FAMILY.submodels), elastic=True)
        plain = [Request(root / "plain" / name, name) for name in FAMILY.submodels]
        to_hf(trained.unquantised(), plain)
        found[form.name] = Exported(trained, root)
    return found


@formats
@pytest.mark.parametrize("name", FAMILY.submodels)
def test_export_then_slice_is_the_export_of_the_submodel(
    exported: dict[str, Exported], form: Format, name: str
) -> None:
    root = exported[form.name].root
    assert bits(stored(root / "own" / name)) == bits(stored(root / "slices" / name))
    for file in ("config.json", "hf_quant_config.json", "elastic_config.json", "README.md"):
        assert (root / "own" / name / file).read_text() == (root / "slices" / name / file).read_text()


@formats
@pytest.mark.parametrize("name", FAMILY.submodels)
def test_it_is_the_slice_of_what_training_updates_quantised_as_its_parent(
    exported: dict[str, Exported], tmp_path: Path, form: Format, name: str
) -> None:
    found, spec = exported[form.name], FAMILY.submodels[name]
    assert FAMILY.space is not None
    of = origin(FAMILY.space, spec)
    excluded = read_object(found.root / "own" / name / "hf_quant_config.json", "")["quantization"][
        "exclude_modules"
    ]
    pack(
        found.root / "plain" / name, tmp_path / "q", form, excluded,
        lambda key, weight: found.trained.largest(of(key), weight),
    )  # fmt: skip
    assert bits(stored(found.root / "own" / name)) == bits(stored(tmp_path / "q"))


@formats
def test_the_modules_left_alone_are_those_of_the_official_checkpoints(
    exported: dict[str, Exported], form: Format
) -> None:
    found = exported[form.name]
    quantised = found.trained.manifest.quantised
    assert quantised is not None and list(quantised.patterns) == left_alone(SHAPE)
    assert read_object(found.elastic / "hf_quant_config.json", "") == quantised.file
    assert read_object(found.elastic / "config.json", "")["quantization_config"] == quantised.config
    assert Manifest.read(found.elastic / "elastic_config.json").quantised is None


@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_back_is_what_training_multiplied_with(
    tmp_path: Path, form: Format, dtype: torch.dtype
) -> None:
    """Every weight in the dtype of training; attention too, whose q, k and v are one linear in training."""
    trained = train(tmp_path / "run", form, dtype=dtype, preset="default", keep_feeding_mamba=False)
    to_hf(open_stored(tmp_path / "run"), [Request(tmp_path / "q")])
    wanted = {
        name: fake_quantise(form, tensor, trained.amax[name].weight) if name in trained.amax else tensor
        for name, tensor in trained.state.items()
    }
    assert len(trained.amax) == 3 * 2 + 2 * (2 * 8 + 2) + 2 + 2
    assert same(dict(dequantised(read_hf(tmp_path / "q")).state()), wanted)
    assert same(dict(dequantised(open_stored(tmp_path / "run")).state()), wanted)
    moved = [n for n, amax in trained.amax.items() if not torch.equal(wanted[n], trained.state[n])]
    assert len(moved) == len(trained.amax)


def test_a_dtype_is_that_of_what_is_not_quantised(tmp_path: Path) -> None:
    """Codes are those of the fp32 weights that were trained; the embedding is rounded, and small tensors stay."""
    train(tmp_path / "run", NVFP4, dtype=torch.float32)
    source = open_stored(tmp_path / "run")
    to_hf(source, [Request(tmp_path / "fp32")])
    to_hf(source, [Request(tmp_path / "bf16")], dtype=torch.bfloat16, verify=True)
    exact, rounded = stored(tmp_path / "fp32"), stored(tmp_path / "bf16")
    assert exact.keys() == rounded.keys()
    parts = [n for n in exact if n.endswith("_scale") or n.endswith("_scale_2") or n + "_scale" in exact]
    assert len(parts) > 100 and {n: exact[n].dtype for n in parts} == {n: rounded[n].dtype for n in parts}
    assert bits({n: exact[n] for n in parts}) == bits({n: rounded[n] for n in parts})
    kept = ("A_log", ".D", "dt_bias", "gate.weight", "e_score_correction_bias")
    for name in exact.keys() - set(parts):
        wanted = torch.float32 if name.endswith(kept) else torch.bfloat16
        assert rounded[name].dtype is wanted and torch.equal(rounded[name], exact[name].to(wanted)), name
    assert read_object(tmp_path / "bf16/config.json", "")["torch_dtype"] == "bfloat16"


@formats
def test_an_import_of_it_holds_its_numbers(
    exported: dict[str, Exported], tmp_path: Path, form: Format
) -> None:
    to_megatron(open_stored(exported[form.name].trained.folder), tmp_path / "numbers", verify=True)
    numbers = open_stored(tmp_path / "numbers")
    assert numbers.quantised is None and numbers.manifest.quantised is None
    assert same(dict(numbers.state()), dict(dequantised(read_hf(exported[form.name].elastic)).state()))


@formats
def test_bytes_are_those_on_disk(exported: dict[str, Exported], form: Format) -> None:
    found = exported[form.name]
    source, directory = open_stored(found.trained.folder), open_stored(found.elastic)
    for name in ("whole", "middle", "smallest"):
        size = sum(t.nbytes for t in stored(found.root / "own" / name).values())
        assert weights_bytes(source, name) == weights_bytes(directory, name) == size
        assert weights_bytes(open_stored(found.root / "own" / name)) == size


def test_a_width_that_parts_a_block_is_refused(tmp_path: Path) -> None:
    manifest = family(choices={"hidden_size": [40], "num_layers": [5]})
    train(tmp_path / "run", NVFP4, manifest=manifest)
    with pytest.raises(UserError, match="hidden_size=40; nearest legal widths: 32, 48"):
        to_hf(open_stored(tmp_path / "run"), [Request(tmp_path / "s", "hidden_size=40")])
    assert not (tmp_path / "s").exists()
