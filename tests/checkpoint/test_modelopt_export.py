"""ModelOpt's own exporter, from a Megatron model: the directories we read, pack in tests and cut are those it writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_files import slice_hf
from hf_models import stored
from quantised_dirs import EXPORTED, bits, family, origin, pack, parents_amax

from elastic_megatron.checkpoint.hf_read import read_config, read_hf
from elastic_megatron.checkpoint.resolve import ELASTIC_CONFIG
from elastic_megatron.checkpoint.source import open_stored
from elastic_megatron.conversion import Request, to_hf
from elastic_megatron.files.json_files import read_object
from elastic_megatron.quantization.formats import FORMATS, INPUT_SCALE, Format

formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``modelopt_oracle`` writes; made elastic."""
    root = tmp_path_factory.mktemp("modelopt")
    oracle = Path(__file__).with_name("modelopt_oracle.py")
    done = subprocess.run(
        [sys.executable, str(oracle), str(root)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for form in FORMATS.values():
        family(EXPORTED).write(root / form.name / ELASTIC_CONFIG)
    return root


@formats
def test_names_types_shapes_and_scales_are_the_exporters(root: Path, tmp_path: Path, form: Format) -> None:
    """Bit for bit, weights included; input scales come from calibration, and are compared by type and shape."""
    exported = stored(root / form.name)
    excluded = list(read_hf(root / form.name).quantised.patterns)  # type: ignore[union-attr]
    packed = stored(pack(root / f"bf16_{form.name}", tmp_path / "q", form, excluded))
    assert packed.keys() == exported.keys()
    scales = 0
    for name, tensor in exported.items():
        if name.endswith((".gate.weight", "e_score_correction_bias")):
            assert torch.equal(tensor, packed[name].to(tensor.dtype)), name
        elif name.endswith(INPUT_SCALE):
            assert (tensor.dtype, tensor.shape) == (packed[name].dtype, packed[name].shape), name
            scales += 1
        else:
            assert bits({name: tensor}) == bits({name: packed[name]}), name
    assert scales == 2 * 2 + 2 * (2 * 6 + 2)  # Mamba layers; experts and the shared one


@formats
def test_our_export_of_the_calibrated_model_is_the_exporters(
    root: Path, tmp_path: Path, form: Format
) -> None:
    """Names, dtypes, shapes, weights and all scales, from a checkpoint with its magnitudes; both descriptions too.

    But for dt_bias, which checkpoints of the family keep in fp32, and so do we.
    """
    to_hf(open_stored(root / f"run_{form.name}"), [Request(tmp_path / "ours")], dtype=torch.bfloat16)
    exported = stored(root / form.name)
    exported |= {n: t.float() for n, t in exported.items() if n.endswith("dt_bias")}
    ours, theirs = bits(stored(tmp_path / "ours")), bits(exported)
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if ours[n] != theirs[n]] == []
    for file in ("hf_quant_config.json", "config.json"):
        a, b = (read_object(d / file, "") for d in (tmp_path / "ours", root / form.name))
        assert a.get("quantization") == b.get("quantization")
        assert a.get("quantization_config") == b.get("quantization_config")


@formats
def test_the_exporters_descriptions_are_the_ones_that_tests_write(
    root: Path, tmp_path: Path, form: Format
) -> None:
    excluded = list(read_hf(root / form.name).quantised.patterns)  # type: ignore[union-attr]
    pack(root / f"bf16_{form.name}", tmp_path / "q", form, excluded)
    found, wanted = (read_config(d)["quantization_config"] for d in (tmp_path / "q", root / form.name))
    assert found == wanted
    assert {n.rpartition(".")[2] for n in excluded} == {
        "embeddings", "conv1d", "gate", "q_proj", "k_proj", "v_proj", "o_proj", "lm_head",
    }  # fmt: skip


@formats
@pytest.mark.parametrize("name", ["middle", "smallest"])
def test_what_it_exported_is_cut(root: Path, tmp_path: Path, form: Format, name: str) -> None:
    described = family(EXPORTED)
    assert described.space is not None
    slice_hf(root / form.name, tmp_path / "s", name)
    slice_hf(root / f"bf16_{form.name}", tmp_path / "b", name)
    amax = parents_amax(root / f"bf16_{form.name}", described.space, described.submodels[name])
    pack(tmp_path / "b", tmp_path / "q", form, list(read_hf(tmp_path / "s").quantised.patterns), amax)  # type: ignore[union-attr]
    found, wanted = bits(stored(tmp_path / "s")), bits(stored(tmp_path / "q"))
    assert found.keys() == wanted.keys()
    same = {n for n in found if not n.endswith((INPUT_SCALE, ".gate.weight", "e_score_correction_bias"))}
    assert {n: found[n] for n in same} == {n: wanted[n] for n in same}
    parent, of = bits(stored(root / form.name)), origin(described.space, described.submodels[name])
    assert all(found[n] == parent[of(n)] for n in found if n.endswith(INPUT_SCALE))
