"""Conversions by tiles equal slices by definition, whatever the tiles; nothing large is ever held."""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hf_files import slice_hf, write_hf
from hf_models import FAMILY, manifest, parent, random_state, same, shapes, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elastic_megatron.checkpoint import raw
from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.slice import permute_state, slice_state
from elastic_megatron.checkpoint.stored import Memory, ModelTensor, StoredModel, in_memory
from elastic_megatron.conversion import Request, copy, hf_target, to_hf
from elastic_megatron.conversion.cut import cut_model
from elastic_megatron.errors import UserError
from elastic_megatron.space import ElasticSpace, SubmodelSpec, axis, undeal
from elastic_megatron.space.axes import AXIS_NAMES

State = dict[str, Tensor]


@dataclass
class Gathered:
    """A sink that keeps what it gets; every row may come once."""

    state: State
    missing: dict[str, int]

    @classmethod
    def of(cls, model: Any) -> Gathered:
        state = {cut.target.name: torch.empty(cut.target.shape, dtype=cut.dtype) for cut in model.cuts}
        return cls(state, {name: len(t) for name, t in state.items()})

    def write(self, tensor: ModelTensor, start: int, rows: Tensor) -> None:
        assert rows.is_contiguous() and rows.dtype == self.state[tensor.name].dtype
        self.state[tensor.name][start : start + len(rows)] = rows
        self.missing[tensor.name] -= len(rows)


@contextmanager
def tiles(size: int, gap: int, stretches: int = 256) -> Iterator[None]:
    with (
        patch.object(copy, "TILE", size),
        patch.object(copy, "_GAP", gap),
        patch.object(copy, "_STRETCHES", stretches),
    ):
        yield


@st.composite
def families(draw: st.DrawFn) -> Manifest:
    """Any model, any lanes, and three submodels of any widths, nested or not."""
    shape = draw(shapes()).override(
        ffn_hidden_size=12, moe_ffn_hidden_size=8, num_moe_experts=8, moe_router_topk=2, hidden_size=9
    )
    axes = [a for a in AXIS_NAMES if shape.size(a) > 1]
    lanes = {a: draw(st.sampled_from([1, 2, 4])) for a in axes if a in _FREE}
    choices = {}
    for a in axes:
        step, floor = lanes.get(a, shape.groups(a)), 2 if a == "num_moe_experts" else 1
        legal = [w for w in range(step, shape.size(a) + 1, step) if w >= floor]
        choices[a] = sorted(draw(st.sets(st.sampled_from(legal), min_size=1, max_size=3)))
    order = draw(st.permutations(range(shape.num_layers)))
    space = ElasticSpace.build(shape, choices, lanes, layer_order=order)
    specs = {
        name: SubmodelSpec.of({a: draw(st.sampled_from(space.choices_of(a))) for a in space.axes})
        for name in ("a", "b", "c")
    }
    return Manifest(shape=shape, space=space, submodels=specs)


_FREE = ("num_moe_experts", "moe_ffn_hidden_size", "ffn_hidden_size")


@settings(max_examples=60, deadline=None)
@given(families(), st.integers(1, 3000), st.integers(0, 200), st.sampled_from([1, 256]))
def test_tiles_of_any_size_give_the_slices(family: Manifest, size: int, gap: int, stretches: int) -> None:
    state = random_state(family.shape, seed=size)
    source = in_memory(family, state)
    models = [cut_model(source, name) for name in family.submodels]
    sinks = [Gathered.of(model) for model in models]
    with tiles(size, gap, stretches):
        copy.copy(source, models, sinks)
    assert family.space is not None
    for sink, spec in zip(sinks, family.submodels.values(), strict=True):
        assert same(sink.state, dict(slice_state(family.space, spec, state.items())))
        assert not any(sink.missing.values())


@settings(max_examples=40, deadline=None)
@given(families(), st.integers(1, 500))
def test_plain_order_is_the_slice_with_its_lanes_undone(family: Manifest, size: int) -> None:
    state, space = random_state(family.shape), family.space
    assert space is not None
    source, spec = in_memory(family, state), family.submodels["a"]
    model = cut_model(source, "a", plain_order=True)
    sink = Gathered.of(model)
    with tiles(size, 0):
        copy.copy(source, [model], [sink])
    orders = {
        (layer, a): undeal(model.shape.size(a), space.lanes_of(a), family.shape.groups(a))
        for a in _FREE
        if a in space.axes
        for layer in model.shape.layers_of(axis(a).symbol)
    }
    sliced = slice_state(space, spec, state.items())
    assert same(sink.state, dict(permute_state(model.shape, orders, sliced)))


@settings(max_examples=15, deadline=None)
@given(families(), st.integers(200, 9000), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_slices_on_disk_are_the_slices(family: Manifest, shard: int, dtype: torch.dtype) -> None:
    """Several submodels in one pass, read back by their own headers."""
    state, space = random_state(family.shape, dtype=dtype), family.space
    assert space is not None
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        requests = [Request(root / name, name) for name in family.submodels]
        report = to_hf(in_memory(family, state), requests, max_shard_bytes=shard, verify=True)
        assert report.verified and report.written == [r.directory for r in requests]
        for request in requests:
            spec = family.submodels[request.submodel or ""]
            opened = read_hf(request.directory)
            assert same(dict(opened.state()), dict(slice_state(space, spec, state.items())))


def test_a_heterogeneous_submodel_is_cut_layer_by_layer() -> None:
    source, state = manifest(), random_state(parent())
    widths = source.submodels["small"].to_dict() | {"num_moe_experts": [4, 6], "num_layers": 6}
    source = replace(source, submodels={"mixed": SubmodelSpec.of(widths)})
    stored_model = in_memory(source, state)
    model = cut_model(stored_model, "mixed")
    sink = Gathered.of(model)
    copy.copy(stored_model, [model], [sink])
    assert source.space is not None
    assert same(sink.state, dict(slice_state(source.space, source.submodels["mixed"], state.items())))
    assert model.shape.num_moe_experts == 6 and model.layer_sizes == {
        1: {"num_moe_experts": 4},
        4: {"num_moe_experts": 6},
    }


def test_a_dropped_layer_does_not_make_a_submodel_heterogeneous() -> None:
    source = manifest()
    widths = source.submodels["small"].to_dict() | {"num_moe_experts": [4, 6], "num_layers": 3}
    assert source.space is not None
    shape = source.space.shape_of(SubmodelSpec.of(widths))
    assert (shape.num_moe_experts, shape.hybrid_layer_pattern) == (4, "ME*")


def test_no_more_is_read_than_is_kept_and_once() -> None:
    """Bytes of stretches that no submodel keeps are not read; those that two keep are read once."""
    read: dict[str, list[range]] = {}

    class Counted(Memory):
        def read(self, key: str, start: int, out: Tensor) -> None:
            read.setdefault(key, []).append(range(start, start + len(out)))
            super().read(key, start, out)

    state = random_state(parent())
    source = replace(in_memory(manifest(), state), files=Counted(state))
    models = [cut_model(source, name) for name in ("middle", "small")]
    with tiles(300, 0):
        copy.copy(source, models, [Gathered.of(model) for model in models])
    assert all(sum(map(len, ranges)) == len(set().union(*ranges)) for ranges in read.values())
    # the dense layer is kept by neither, six of eight experts of the first MoE layer by one
    assert not any(key.startswith("decoder.layers.5.") for key in read)
    experts = {int(key.split(".")[6]) for key in read if "layers.1.mlp.experts" in key}
    assert experts == {0, 1, 2, 4, 5, 6}
    # 8 of 12 channels in two lanes: the first four of each six
    up = read["decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight"]
    assert set().union(*up) == {0, 1, 2, 3, 6, 7, 8, 9}


def test_memory_is_a_tile_for_each_thread(tmp_path: Path) -> None:
    """Rows of a source tensor are handed out in new tensors; how many are alive at once is the bound."""
    alive: set[int] = set()
    most = 0

    class Tracked(StoredModel):
        def rows(self, tensor: ModelTensor, start: int = 0, stop: int | None = None) -> Tensor:
            nonlocal most
            out = super().rows(tensor, start, stop)
            assert out.nbytes <= max(400, out[:1].nbytes)
            alive.add(id(out))
            weakref.finalize(out, alive.discard, id(out))
            most = max(most, len(alive))
            return out

    state = random_state(parent())
    base = in_memory(manifest(), state)
    source = Tracked(base.path, base.manifest, base.files, base.pieces)
    gc.collect()
    with tiles(400, 0):
        to_hf(source, [Request(tmp_path / n, n) for n in FAMILY])
    assert most <= copy.threads() + 1


def test_few_files_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be more shards than a process may have files open."""
    alive: list[int] = [0, 0]

    class Counted(raw.OpenFile):
        def __init__(self, path: Path, flags: int) -> None:
            super().__init__(path, flags)
            alive[0] += 1
            alive[1] = max(alive)

        def __del__(self) -> None:
            super().__del__()
            alive[0] -= 1

    monkeypatch.setattr(raw, "OpenFile", Counted)
    monkeypatch.setattr(raw, "_OPEN_FILES", 3)
    state = random_state(parent())
    write_hf(tmp_path / "m", manifest(), state.items(), max_shard_bytes=500)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 30
    assert same(dict(read_hf(tmp_path / "m").state()), state)
    assert 3 < alive[1] <= 3 + copy.threads() + 1


def test_slicing_commutes_with_export(tmp_path: Path) -> None:
    source, state = manifest(), random_state(parent())
    write_hf(tmp_path / "elastic", source, state.items(), elastic=True)
    slice_hf(tmp_path / "elastic", tmp_path / "sliced", "small")
    write_hf(tmp_path / "exported", source, state.items(), submodel="small")
    for folder in ("sliced", "exported"):
        (tmp_path / folder / "README.md").unlink()
    assert _bytes(tmp_path / "sliced") == _bytes(tmp_path / "exported")


def _bytes(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_a_damaged_copy_is_noticed_and_left_unnamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One flipped bit between writing and reading back."""
    written = hf_target._complete

    def damage(folder: Path, *rest: Any) -> None:
        written(folder, *rest)
        with open(folder / "model.safetensors", "r+b") as f:
            f.seek(-5, 2)
            byte = f.read(1)
            f.seek(-5, 2)
            f.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(hf_target, "_complete", damage)
    with pytest.raises(UserError, match=r"tensor '.*' differs from its source in rows \d+ to \d+"):
        write_hf(tmp_path / "m", manifest(), random_state(parent()).items(), verify=True)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"has 0\.0 GiB free, the conversion writes 0\.1 GiB; free space"):
        write_hf(tmp_path / "a/b/m", manifest(), random_state(parent()).items())
    assert list(tmp_path.iterdir()) == []


def test_shards_are_in_the_order_of_the_model_and_aligned(tmp_path: Path) -> None:
    state: State = {n: t.bfloat16() if t.dim() > 1 else t for n, t in random_state(parent()).items()}
    write_hf(tmp_path / "m", manifest(), state.items(), max_shard_bytes=8000)
    from elastic_megatron.checkpoint.safetensors_files import read_header

    firsts = []
    for file in sorted((tmp_path / "m").glob("*.safetensors")):
        header = read_header(file)
        assert all(offset % entry.dtype.itemsize == 0 for entry, offset in header.values())
        firsts.append(min(_layer(name) for name in header))
    assert firsts == sorted(firsts)
    assert stored(tmp_path / "m").keys() == set(read_hf(tmp_path / "m").files.entries)


def _layer(name: str) -> int:
    return int(name.split(".")[2]) if ".layers." in name else -1
