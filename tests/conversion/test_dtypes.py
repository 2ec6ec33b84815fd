"""Every stored tensor is read in its own dtype, whatever the dtypes of those that are joined with it."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hf_files import hub_tensors, megatron_tensors, slice_hf, write_hf
from hf_models import FAMILY, manifest, parent, random_state, same, shapes, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch_dist_by_hand import keys_of_megatron, write_by_hand

from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.slice import slice_state
from elastic_megatron.checkpoint.stored import DTYPES, StoredModel
from elastic_megatron.checkpoint.torch_dist import open_torch_dist
from elastic_megatron.conversion import Request, to_hf, to_megatron
from elastic_megatron.space import ParentShape

State = Mapping[str, Tensor]
PAIRS = list(itertools.product(DTYPES, DTYPES))


def retyped(directory: Path, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Change the dtypes of a directory's tensors; returns them."""
    tensors = {key: tensor.to(dtypes.get(key, tensor.dtype)) for key, tensor in stored(directory).items()}
    for file in directory.glob("model*"):
        file.unlink()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return tensors


def joined(shape: ParentShape, tensors: State) -> dict[str, Tensor]:
    """Megatron's tensors; ``torch.cat`` promotes."""
    return dict(megatron_tensors(shape, lambda key: tensors[key]))


def numbers(state: State) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in state.items()}


def by_stretches(opened: StoredModel, size: int) -> dict[str, Tensor]:
    return {
        name: torch.cat([opened.rows(t, i, min(i + size, t.shape[0])) for i in range(0, t.shape[0], size)])
        for name, t in opened.tensors.items()
    }


@settings(max_examples=25, deadline=None)
@given(shapes(), st.data())
def test_directories_of_any_dtypes_are_imported_and_exported(shape: ParentShape, data: st.DataObject) -> None:
    """No number changes; a tensor that is joined of several has the dtype that torch promotes theirs to."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_hf(root / "m", Manifest(shape=shape), random_state(shape).items())
        keys = sorted(stored(root / "m"))
        dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=len(keys), max_size=len(keys)))
        chosen = dict(zip(keys, dtypes, strict=True))
        if shape.tie_embeddings:  # the head is a copy: what one dtype rounds away, the other must not keep
            chosen["lm_head.weight"] = chosen["backbone.embeddings.weight"]
        tensors = retyped(root / "m", chosen)
        assert same(dict(read_hf(root / "m").state()), joined(shape, tensors))
        assert same(by_stretches(read_hf(root / "m"), 3), joined(shape, tensors))
        to_megatron(read_hf(root / "m"), root / "c", verify=True)
        opened = open_torch_dist(root / "c/iter_0000000", Manifest(shape=shape), None)
        assert same(numbers(dict(opened.state())), numbers(joined(shape, tensors)))
        to_hf(opened, [Request(root / "out")], verify=True)
        assert same(numbers(stored(root / "out")), numbers(tensors))


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=str)
def test_every_joined_tensor_holds_every_pair_of_dtypes(
    one: torch.dtype, other: torch.dtype, tmp_path: Path
) -> None:
    """q, k and v in one of Megatron, experts in one of ``torch_dist``: imported, cut and exported as they were."""
    family = manifest()
    shape, space = family.shape, family.space
    assert space is not None
    write_hf(tmp_path / "m", family, random_state(shape).items(), elastic=True)
    odd = {
        k: other for k in stored(tmp_path / "m") if "k_proj" in k or "experts.3." in k or "experts.0.d" in k
    }
    tensors = retyped(tmp_path / "m", {k: odd.get(k, one) for k in stored(tmp_path / "m")})
    state = joined(shape, tensors)
    report = to_megatron(read_hf(tmp_path / "m"), tmp_path / "c", verify=True)
    assert any("loses nothing" in note for note in report.notes) == (one != other)
    to_hf(
        open_torch_dist(tmp_path / "c/iter_0000000", family, None), [Request(tmp_path / "out")], verify=True
    )
    assert same(numbers(stored(tmp_path / "out")), numbers(tensors))
    slice_hf(tmp_path / "m", tmp_path / "s", list(FAMILY))
    for name, spec in family.submodels.items():
        cut = dict(read_hf(tmp_path / "s" / name).state())
        assert same(cut, dict(slice_state(space, spec, state.items())))


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=str)
def test_parts_of_a_checkpoint_have_their_own_dtypes(
    one: torch.dtype, other: torch.dtype, tmp_path: Path
) -> None:
    """``in_proj`` and the convolution are split there; columns that ranks cut are read through a buffer."""
    shape = parent()
    keys = keys_of_megatron(random_state(shape), shape)
    typed = {k: t.to(other if k.endswith((".x", ".B")) else one) for k, t in keys.items()}
    cuts = {k: [[1, t.shape[0] - 1], [5, 11]] for k, t in typed.items() if t.dim() == 2 and t.shape[1] == 16}
    write_by_hand(tmp_path / "c", typed, cuts, files=2)
    opened = open_torch_dist(tmp_path / "c", Manifest(shape=shape), None)
    to_hf(opened, [Request(tmp_path / "out")], verify=True)
    wanted = {
        key: tensor
        for name, t in joined_parts(shape, typed).items()
        for key, tensor in hub_tensors(shape, name, t)
    }
    assert same(stored(tmp_path / "out"), wanted)


def joined_parts(shape: ParentShape, typed: State) -> dict[str, Tensor]:
    """The state of a module from what ``keys_of_megatron`` took apart, by doing it to labels of its rows."""
    out: dict[str, Tensor] = {}
    for name in random_state(shape):
        key = name.replace("conv1d_", "conv1d.")
        labels = [label for label in ("z", "x", "B", "C", "dt") if f"{key}.{label}" in typed]
        if labels:
            out[name] = torch.cat([typed[f"{key}.{label}"] for label in labels])
        elif "local_experts" in name:
            expert = int(name.split(".")[6])
            out[name] = typed[name.replace(f"local_experts.{expert}.", "experts.")][expert]
        else:
            fused = {v: k for k, v in _fused(shape).items()}
            out[name] = typed[fused.get(name, name)]
    return out


def _fused(shape: ParentShape) -> dict[str, str]:
    """Norms that ``torch_dist`` calls by the linear behind them: their key by their name."""
    found = {"M": ("mixer.in_proj", "norm"), "*": ("self_attention.linear_qkv", "input_layernorm"),
             "-": ("mlp.linear_fc1", "pre_mlp_layernorm")}  # fmt: skip
    return {
        f"decoder.layers.{i}.{found[s][0]}.layer_norm_weight": f"decoder.layers.{i}.{found[s][1]}.weight"
        for i, s in enumerate(shape.hybrid_layer_pattern)
        if s in found
    }


def test_a_tied_head_is_compared_as_numbers(tmp_path: Path) -> None:
    shape = parent(tie_embeddings=True)
    state = {n: t.bfloat16() for n, t in random_state(shape).items()}
    write_hf(tmp_path / "m", Manifest(shape=shape), state.items())
    retyped(tmp_path / "m", {"lm_head.weight": torch.float32})
    assert same(dict(read_hf(tmp_path / "m").state()), state)
