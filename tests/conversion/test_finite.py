"""Nothing that is not finite is converted in silence, wherever it lies and whatever would hide it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hf_files import slice_hf, write_hf
from hf_models import FAMILY, manifest, parent, random_state, same, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from quantised_dirs import SHAPE, bits, pack
from safetensors.torch import save_file
from torch import Tensor

from elastic_megatron.checkpoint.amax import Amax
from elastic_megatron.checkpoint.hf_names import hf_pieces
from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.packed import packed
from elastic_megatron.checkpoint.quantised_plan import planned
from elastic_megatron.checkpoint.stored import DTYPES, StoredModel, in_memory, quantised_weights
from elastic_megatron.conversion import Request, to_hf, to_megatron
from elastic_megatron.conversion.finite import all_finite
from elastic_megatron.errors import UserError
from elastic_megatron.quantization.formats import (
    FORMATS,
    INPUT_SCALE,
    NVFP4,
    WEIGHT_SCALE,
    WEIGHT_SCALE_2,
    Format,
)
from elastic_megatron.quantization.presets import PRESETS

WRONG = (math.nan, math.inf, -math.inf)
formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def refused(source: StoredModel, target: Path, *names: str) -> None:
    """To a directory and to a checkpoint: each tensor is named, and nothing is left."""
    for write in (lambda: to_hf(source, [Request(target)]), lambda: to_megatron(source, target)):
        with pytest.raises(UserError, match="not finite.*nothing was written.*--allow-nonfinite") as caught:
            write()
        assert all(f"{name} (" in str(caught.value) for name in names), str(caught.value)
        assert not list(target.parent.iterdir())


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_one_pass_tells_whether_all_values_are_finite(data: st.DataObject) -> None:
    """Also where finite values add up to more than their dtype holds."""
    dtype = data.draw(st.sampled_from(DTYPES))
    values = st.sampled_from([0.0, 1.5, -65504.0, 1e30, 3e38, -3e38, *WRONG])
    found = torch.tensor(data.draw(st.lists(values, min_size=1, max_size=40)), dtype=torch.float64).to(dtype)
    assert all_finite(found) == bool(found.isfinite().all())


def test_one_value_of_any_tensor_is_named(tmp_path: Path) -> None:
    """Of q, k and v as Hugging Face keeps them."""
    shape = parent()
    for i, (name, tensor) in enumerate(random_state(shape).items()):
        state = random_state(shape)
        state[name].view(-1)[(7 * i) % tensor.numel()] = WRONG[i % 3]
        source = in_memory(Manifest(shape=shape), state)
        with pytest.raises(UserError, match=r": 1 tensor with") as caught:
            to_hf(source, [Request(tmp_path / "m")])
        [wrong] = [
            piece.key
            for piece, rows in zip(
                hf_pieces(source.tensors[name]),
                state[name].split([p.rows for p in hf_pieces(source.tensors[name])]),
                strict=True,
            )
            if not rows.isfinite().all()
        ]
        assert f"{wrong} (1 value)" in str(caught.value)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_refused_or_written_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    state = random_state(parent(), dtype=dtype)
    state["decoder.layers.1.mlp.experts.local_experts.5.linear_fc2.weight"][3, :2] = math.nan
    state["decoder.layers.3.self_attention.linear_qkv.weight"].fill_(math.inf)
    source = in_memory(manifest(), state)
    names = ["backbone.layers.1.mixer.experts.5.down_proj.weight"]
    names += [f"backbone.layers.3.mixer.{p}_proj.weight" for p in "qkv"]
    refused(source, tmp_path / "m", *names)
    report = to_hf(source, [Request(tmp_path / "m")], verify=True, allow_nonfinite=True)
    [warning] = report.notes
    assert warning.startswith(f"warning: {tmp_path / 'm'}: 4 tensors") and f"{names[0]} (2 values)" in warning
    assert bits(dict(read_hf(tmp_path / "m").state())) == bits(state)
    report = to_megatron(read_hf(tmp_path / "m"), tmp_path / "c", verify=True, allow_nonfinite=True)
    assert sum(note.startswith("warning: ") for note in report.notes) == 1


def test_a_submodel_is_judged_by_what_it_keeps(tmp_path: Path) -> None:
    """An expert that only the large one has, and columns that only the larger two have."""
    state = random_state(parent())
    state["decoder.layers.1.mlp.experts.local_experts.7.linear_fc1.weight"][0, 0] = math.nan
    write_hf(tmp_path / "m", manifest(), state.items(), elastic=True, allow_nonfinite=True)
    slice_hf(tmp_path / "m", tmp_path / "s", ["middle", "small"])
    state["decoder.layers.1.mlp.shared_experts.linear_fc1.weight"][0, 11] = math.nan
    write_hf(tmp_path / "n", manifest(), state.items(), elastic=True, allow_nonfinite=True)
    slice_hf(tmp_path / "n", tmp_path / "t", "small")
    with pytest.raises(UserError, match=rf"{tmp_path / 'u' / 'middle'}: 1 tensor .*shared_experts\.up_proj"):
        slice_hf(tmp_path / "n", tmp_path / "u", list(FAMILY)[1:])
    assert not (tmp_path / "u").exists()


def test_what_a_narrower_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    state = random_state(parent())
    state["output_layer.weight"][0, 0] = 3.4e38
    source = in_memory(manifest(), state)
    to_hf(source, [Request(tmp_path / "fp32")], dtype=torch.float32)
    with pytest.raises(UserError, match=r"lm_head\.weight \(1 value\)"):
        to_hf(source, [Request(tmp_path / "bf16")], dtype=torch.bfloat16)


def trained(
    form: Format, state: Mapping[str, Tensor], changed: Mapping[str, Amax] | None = None
) -> StoredModel:
    """A checkpoint of a quantised model, as what will be stored of it."""
    blocks = PRESETS["mamba_moe_aggressive"].blocks
    quantised = planned(form, SHAPE, blocks, keep_feeding_mamba=True, version="0.47.0")
    found = {
        n: Amax(state[n].abs().max().float(), torch.tensor(2.0)) for n in quantised_weights(SHAPE, quantised)
    }
    source = in_memory(Manifest(shape=SHAPE, quantised=quantised), state)
    return packed(source, quantised, {**found, **(changed or {})})


@formats
def test_rounding_hides_nothing(form: Format, tmp_path: Path) -> None:
    """Infinite weights are not rounded to large ones, magnitudes that are no numbers not taken for 1."""
    name, key = "decoder.layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.in_proj."
    lost = key + (WEIGHT_SCALE if form is NVFP4 else "weight")
    own = key + (WEIGHT_SCALE_2 if form is NVFP4 else WEIGHT_SCALE)
    for value in WRONG:
        state = random_state(SHAPE)
        amax = Amax(state[name].abs().max(), torch.tensor(2.0))
        state[name][5, 33] = value
        refused_export(trained(form, state, {name: amax}), tmp_path / "m", f"{lost} (1 value)")
    state = random_state(SHAPE)
    for value in (*WRONG, -1.0):
        wrong, right = torch.tensor(value), torch.tensor(2.0)
        refused_export(trained(form, state, {name: Amax(wrong, right)}), tmp_path / "m", f"{own} (1 value)")
        refused_export(
            trained(form, state, {name: Amax(right, wrong)}), tmp_path / "m", f"{key}{INPUT_SCALE} (1 value)"
        )
    zeros = {name: Amax(torch.tensor(0.0), torch.tensor(0.0))}
    state[name].zero_()
    to_hf(trained(form, state, zeros), [Request(tmp_path / "m")])
    scales = [t.float() for k, t in stored(tmp_path / "m").items() if "scale" in k]
    assert all(s.isfinite().all() and (s > 0).all() for s in scales)


def refused_export(source: StoredModel, target: Path, name: str) -> None:
    with pytest.raises(UserError, match="nothing was written") as caught:
        to_hf(source, [Request(target)])
    assert name in str(caught.value), str(caught.value)
    assert not target.exists()


@formats
def test_scales_of_a_directory_are_positive(form: Format, tmp_path: Path) -> None:
    """A block of zeros may have the scale 0, as older releases of ModelOpt write it."""
    write_hf(tmp_path / "plain", Manifest(shape=SHAPE), random_state(SHAPE, dtype=torch.bfloat16).items())
    pack(tmp_path / "plain", tmp_path / "m", form)
    key, whole = "backbone.layers.0.mixer.in_proj.", stored(tmp_path / "m")
    suffixes = [INPUT_SCALE, *([WEIGHT_SCALE_2, WEIGHT_SCALE] if form is NVFP4 else [WEIGHT_SCALE])]
    cases = [(key + s, v) for s in suffixes for v in (math.nan, -1.0)]
    cases += [(key + s, 0.0) for s in suffixes if form is not NVFP4 or s != WEIGHT_SCALE]
    cases += [(key + "weight", math.nan)] if form is not NVFP4 else []
    for name, value in cases:
        tensors = {k: t.clone() for k, t in whole.items()}
        tensors[name].view(-1)[0] = value
        save_file(tensors, tmp_path / "m/model.safetensors", {"format": "pt"})
        refused_export(read_hf(tmp_path / "m"), tmp_path / "out", f"{name} (1 value)")
    if form is NVFP4:
        tensors = {k: t.clone() for k, t in whole.items()}
        tensors[key + WEIGHT_SCALE][0, 0] = 0
        save_file(tensors, tmp_path / "m/model.safetensors", {"format": "pt"})
        to_hf(read_hf(tmp_path / "m"), [Request(tmp_path / "out")])
        assert same(stored(tmp_path / "out"), tensors)
