"""Law 8: cutting a quantised directory is quantising the cut one, with the scales of the parent, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hf_files import slice_hf, write_hf
from hf_models import random_state, same, stored
from hypothesis import given
from hypothesis import strategies as st
from quantised_dirs import CHOICES, SHAPE, bits, family, left_alone, pack, parents_amax

from elastic_megatron.checkpoint.dequantised import dequantised
from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.conversion import Request, copy, to_hf
from elastic_megatron.errors import UserError
from elastic_megatron.files.json_files import read_object
from elastic_megatron.quantization.formats import FORMATS, FP8, NVFP4, Format
from elastic_megatron.space import whole_blocks

FAMILY = family()
formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def excluded(directory: Path) -> list[str]:
    return read_object(directory / "hf_quant_config.json", "")["quantization"]["exclude_modules"]


@contextmanager
def small_tiles(size: int = 700) -> Iterator[None]:
    """Tiles of a few rows, so that parts of a weight are cut at different places."""
    with patch.object(copy, "TILE", size), patch.object(copy, "_GAP", 0), patch.object(copy, "_STRETCHES", 3):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family unquantised, its slices, and both quantised."""
    root = tmp_path_factory.mktemp("quantised")
    write_hf(root / "bf16", FAMILY, random_state(SHAPE).items(), elastic=True, dtype=torch.bfloat16)
    slice_hf(root / "bf16", root / "bf16_slices", list(FAMILY.submodels))
    for form in FORMATS.values():
        pack(root / "bf16", root / form.name, form)
        with small_tiles():
            slice_hf(root / form.name, root / f"{form.name}_slices", list(FAMILY.submodels), elastic=True)
    return root


@formats
@pytest.mark.parametrize("name", FAMILY.submodels)
def test_sliced_quantised_is_quantised_sliced(root: Path, tmp_path: Path, form: Format, name: str) -> None:
    """Every tensor, its dtype and shape; both descriptions; weights over two lanes; with no module in a wrong place."""
    assert FAMILY.space is not None
    sliced, spec = root / f"{form.name}_slices" / name, FAMILY.submodels[name]
    amax = parents_amax(root / "bf16", FAMILY.space, spec)
    alone = renumbered(left_alone(SHAPE), FAMILY.space.kept_layers(spec))
    pack(root / "bf16_slices" / name, tmp_path / "q", form, alone, amax)
    assert bits(stored(sliced)) == bits(stored(tmp_path / "q"))
    for file in ("hf_quant_config.json", "config.json"):
        assert read_object(sliced / file, "") == read_object(tmp_path / "q" / file, "")


def renumbered(modules: list[str], layers: tuple[int, ...]) -> list[str]:
    """Names of modules in the layers that are kept, by their new numbers."""
    found = []
    for name in modules:
        match = re.match(r"backbone\.layers\.(\d+)\.", name)
        if match is None:
            found.append(name)
        elif int(match[1]) in layers:
            found.append(name.replace(match[0], f"backbone.layers.{layers.index(int(match[1]))}."))
    return sorted(found)


@formats
def test_dequantising_commutes_with_slicing(root: Path, tmp_path: Path, form: Format) -> None:
    to_hf(dequantised(read_hf(root / form.name)), [Request(tmp_path / "numbers", None, elastic=True)])
    assert "quantization_config" not in (tmp_path / "numbers/config.json").read_text()
    slice_hf(tmp_path / "numbers", tmp_path / "slices", list(FAMILY.submodels))
    for name in FAMILY.submodels:
        sliced = dequantised(read_hf(root / f"{form.name}_slices" / name))
        assert same(dict(sliced.state()), dict(read_hf(tmp_path / "slices" / name).state()))


@formats
def test_the_numbers_are_near_the_weights(root: Path, form: Format) -> None:
    """No column has the scale of another: each block is as near as its format allows."""
    exact = dict(read_hf(root / "bf16").state())
    for name, tensor in dequantised(read_hf(root / form.name)).state():
        distance = (tensor.float() - exact[name].float()).norm() / exact[name].float().norm()
        quantised = ("layers" in name and "linear" in name) or "_proj" in name
        assert tensor.dtype is exact[name].dtype
        assert distance < (0.12 if form is NVFP4 else 0.03) if quantised else distance == 0


@formats
def test_slice_of_a_slice_is_the_slice(root: Path, tmp_path: Path, form: Format) -> None:
    slices = root / f"{form.name}_slices"
    with small_tiles(300):
        slice_hf(slices / "middle", tmp_path / "again", "smallest", elastic=True)
    assert bits(stored(tmp_path / "again")) == bits(stored(slices / "smallest"))
    for file in ("config.json", "hf_quant_config.json", "elastic_config.json"):
        assert read_object(tmp_path / "again" / file, "") == read_object(slices / "smallest" / file, "")


@formats
def test_whole_is_what_it_was(root: Path, form: Format) -> None:
    whole = root / f"{form.name}_slices/whole"
    assert bits(stored(whole)) == bits(stored(root / form.name))
    for file in ("hf_quant_config.json", "config.json"):
        assert read_object(whole / file, "") == read_object(root / form.name / file, "")


@formats
def test_everything_may_be_quantised_but_the_router(tmp_path: Path, form: Format) -> None:
    """Attention too, whose q, k and v have numbers of their own; lists may hold patterns; a slice has none."""
    write_hf(tmp_path / "bf16", FAMILY, random_state(SHAPE).items(), elastic=True, dtype=torch.bfloat16)
    pack(
        tmp_path / "bf16",
        tmp_path / "q",
        form,
        ["*.conv1d", "backbone.layers.1.mixer.gat?", "backbone.emb*", "mtp*"],
    )
    slice_hf(tmp_path / "bf16", tmp_path / "b", "middle")
    with small_tiles():
        to_hf(read_hf(tmp_path / "q"), [Request(tmp_path / "s", "middle")], verify=True)
    assert FAMILY.space is not None
    amax = parents_amax(tmp_path / "bf16", FAMILY.space, FAMILY.submodels["middle"])
    pack(tmp_path / "b", tmp_path / "bq", form, [], amax)
    assert bits(stored(tmp_path / "s")) == bits(stored(tmp_path / "bq"))
    stated = excluded(tmp_path / "s")
    mamba = [f"backbone.layers.{i}.mixer.conv1d" for i in (0, 2, 5)]
    assert stated == ["backbone.embeddings", mamba[0], "backbone.layers.1.mixer.gate", *mamba[1:]]


def test_a_whole_that_is_tied_keeps_its_head_out(tmp_path: Path) -> None:
    shape = SHAPE.override(tie_embeddings=True)
    source = family(shape)
    write_hf(tmp_path / "bf16", source, random_state(shape).items(), elastic=True, dtype=torch.bfloat16)
    pack(tmp_path / "bf16", tmp_path / "q", NVFP4)
    slice_hf(tmp_path / "q", tmp_path / "s", "middle")
    stated = excluded(tmp_path / "s")
    assert stated[-1] == "lm_head" and read_hf(tmp_path / "s").manifest.shape.tie_embeddings


PARTED = {
    "hidden_size": (40, "hidden_size=40; nearest legal widths: 32, 48"),
    "mamba_head_dim": (24, "mamba_head_dim=24; nearest legal widths: 16, 32"),
    "moe_ffn_hidden_size": (48, "moe_ffn_hidden_size=48 in 2 lanes; nearest legal widths: 32, 64"),
    "ffn_hidden_size": (16, "ffn_hidden_size=16 in 2 lanes; nearest legal widths: 32"),
    "moe_shared_expert_intermediate_size": (24, "size=24; nearest legal widths: 16, 32"),
}


@pytest.mark.parametrize("axis", PARTED)
def test_widths_that_part_a_block_are_refused_for_nvfp4_and_not_for_fp8(tmp_path: Path, axis: str) -> None:
    """Blocks are whole in every lane: 48 of 64 are whole blocks in one lane, and 24 of 32 in each of two are not."""
    width, message = PARTED[axis]
    source = family(choices={**CHOICES, axis: [width]})
    write_hf(tmp_path / "bf16", source, random_state(SHAPE).items(), elastic=True, dtype=torch.bfloat16)
    for form in (FP8, NVFP4):
        pack(tmp_path / "bf16", tmp_path / form.name, form)
    slice_hf(tmp_path / "fp8", tmp_path / "s", f"{axis}={width}")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        slice_hf(tmp_path / "nvfp4", tmp_path / "n", f"{axis}={width}")
    assert "\n" not in str(error.value) and not (tmp_path / "n").exists()


def test_rows_may_be_any(tmp_path: Path) -> None:
    """States and heads of a Mamba layer whose output projection is not quantised lie along rows only."""
    source = family(choices={**CHOICES, "mamba_state_dim": [5], "num_attention_heads": [2]})
    write_hf(tmp_path / "bf16", source, random_state(SHAPE).items(), elastic=True, dtype=torch.bfloat16)
    pack(tmp_path / "bf16", tmp_path / "q", NVFP4)
    slice_hf(tmp_path / "q", tmp_path / "s", ["mamba_state_dim=5", "num_attention_heads=2"])
    sizes = {
        name: read_hf(tmp_path / "s" / name).manifest.shape
        for name in ("mamba_state_dim=5", "num_attention_heads=2")
    }
    assert sizes["mamba_state_dim=5"].mamba_state_dim == 5
    assert sizes["num_attention_heads=2"].num_attention_heads == 2


def test_lanes_are_undone_where_nothing_is_in_blocks(root: Path, tmp_path: Path) -> None:
    request = Request(tmp_path / "s", "middle", plain_order=True)
    with pytest.raises(UserError, match="--plain-order undoes the lanes, which parts the blocks of 16"):
        to_hf(read_hf(root / "nvfp4"), [request])
    to_hf(read_hf(root / "fp8"), [request], verify=True)
    to_hf(read_hf(root / "bf16"), [Request(tmp_path / "b", "middle", plain_order=True)])
    assert FAMILY.space is not None
    plain = read_hf(tmp_path / "s")
    key = "decoder.layers.1.mlp.shared_experts.linear_fc1.weight"
    assert plain.tensors[key].shape == read_hf(tmp_path / "b").tensors[key].shape


def test_a_dtype_is_that_of_what_is_not_quantised(root: Path, tmp_path: Path) -> None:
    to_hf(read_hf(root / "nvfp4"), [Request(tmp_path / "s")], dtype=torch.float32)
    found, was = stored(tmp_path / "s"), stored(root / "nvfp4")
    wanted = {n: t.float() if t.dtype is torch.bfloat16 else t for n, t in was.items()}
    assert bits(found) == bits(wanted)


def test_the_card_names_the_format(root: Path) -> None:
    for form in FORMATS.values():
        card = (root / f"{form.name}_slices/smallest/README.md").read_text()
        assert f"- {form.name}" in card and f"The weights are quantised to {form.algo}:" in card
        assert "from transformers" not in card and "vllm serve DIR" in card


@given(st.lists(st.integers(0, 5), max_size=6), st.sampled_from([1, 2, 16]))
def test_whole_blocks_are_those_of_their_positions(blocks: list[int], size: int) -> None:
    assert whole_blocks([b * size + i for b in blocks for i in range(size)], size) == blocks


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.sampled_from([2, 3, 16]))
def test_other_positions_are_no_blocks(positions: list[int], size: int) -> None:
    groups = [positions[i : i + size] for i in range(0, len(positions), size)]
    whole = all(g == list(range(g[0], g[0] + size)) and g[0] % size == 0 for g in groups)
    assert (whole_blocks(positions, size) is not None) == whole
