"""A ``torch_dist`` folder written by rows is the one that Megatron would have written, in memory that is bounded."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import tempfile
import threading
import time
import weakref
from collections.abc import Buffer, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import SHAPE, randomise
from torch import Tensor, nn

from elastic_megatron import runtime
from elastic_megatron.blocks import build_model
from elastic_megatron.checkpoint import distributed, integrity
from elastic_megatron.checkpoint.manifest import FILE, Manifest
from elastic_megatron.checkpoint.stored import ModelTensor, model_tensors
from elastic_megatron.conversion.torch_dist_files import _Stream, write_torch_dist
from elastic_megatron.space import ParentShape

MODELS = {
    "all blocks": SHAPE.override(hybrid_layer_pattern="MEM*E-"),
    "tied": SHAPE.override(hybrid_layer_pattern="MEM*E-", tie_embeddings=True),
    "no shared experts": SHAPE.override(hybrid_layer_pattern="E*M", moe_shared_expert_intermediate_size=0),
    "one layer": SHAPE.override(hybrid_layer_pattern="-"),
}
# embedding and output layer hold nearly all of it
WIDE, CHUNK = SHAPE.override(vocab_size=5000), 2000
# unfused norms and the attention core of Transformer Engine
EXTRAS = {"E": "pre_mlp_layernorm", "*": "self_attention.core_attention"}


def model(shape: ParentShape, seed: int, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Mamba's A and D and the correction bias are fp32 in it whatever ``dtype`` is."""
    runtime.start(seed=seed)
    return randomise(build_model(shape, dtype=dtype), seed)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if value is not None}


def write(folder: Path, shape: ParentShape, state: Mapping[str, Tensor], **options: int) -> None:
    tensors = [(t, state[t.name].dtype) for t in model_tensors(shape)]
    assert {t.name for t, _ in tensors} == set(state)
    write_torch_dist(folder, tensors, lambda t, start, stop: state[t.name][start:stop], **options)
    Manifest(shape=shape).write(folder / FILE)


def random_state(shape: ParentShape, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> dict[str, Tensor]:
    return {
        t.name: torch.randn(t.shape).to(dtypes[i % len(dtypes)]) for i, t in enumerate(model_tensors(shape))
    }


def contents(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    """Shape and dtype of every tensor by key; ``None`` for every object."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        key: None
        if isinstance(entry, dcp.BytesStorageMetadata)
        else (tuple(entry.size), entry.properties.dtype)
        for key, entry in metadata.items()
    }


def by_key(shape: ParentShape, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What each key holds, from the rows of ``in_proj`` and the convolution, and the experts of each layer."""
    out: dict[str, Tensor] = {}
    heads, states = (
        shape.mamba_num_heads * shape.mamba_head_dim,
        shape.mamba_num_groups * shape.mamba_state_dim,
    )
    parts = {"z": heads, "x": heads, "B": states, "C": states, "dt": shape.mamba_num_heads}
    for name, value in state.items():
        layer = ".".join(name.split(".")[:3])
        if "conv1d_" in name or "in_proj" in name:
            labels = ["x", "B", "C"] if "conv1d_" in name else list(parts)
            key = name.replace("conv1d_", "conv1d.")
            out |= {
                f"{key}.{n}": v for n, v in zip(labels, value.split([parts[n] for n in labels]), strict=True)
            }
        elif "local_experts.0." in name:
            linear = name.split(".")[-2]
            out[f"{layer}.mlp.experts.experts.{linear}.weight"] = torch.stack(
                [state[name.replace("experts.0.", f"experts.{e}.")] for e in range(shape.num_moe_experts)]
            )
        elif "local_experts." not in name:
            symbol = (
                shape.hybrid_layer_pattern[int(layer.split(".")[2])] if layer.startswith("decoder.l") else ""
            )
            fused = {"M": "mixer.in_proj", "*": "self_attention.linear_qkv", "-": "mlp.linear_fc1"}
            if symbol in fused and name in (f"{layer}.{n}.weight" for n in NORMS):
                name = f"{layer}.{fused[symbol]}.layer_norm_weight"
            out[name] = value
    return out


NORMS = ("norm", "input_layernorm", "pre_mlp_layernorm")


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("chunk_bytes", [97, 1 << 20])
def test_megatron_loads_every_bit(shape: ParentShape, chunk_bytes: int, tmp_path: Path) -> None:
    state = weights(model(shape, 1))
    write(tmp_path / "c", shape, state, chunk_bytes=chunk_bytes)
    other = model(shape, 2)
    assert not torch.equal(state["embedding.word_embeddings.weight"], other.embedding.word_embeddings.weight)
    assert distributed.load(tmp_path / "c", [other]) == {}
    loaded = weights(other)
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
def test_keys_are_those_of_megatron_and_the_extras_of_transformer_engine(
    shape: ParentShape, tmp_path: Path
) -> None:
    built = model(shape, 1)
    real = contents(distributed.save(tmp_path / "real", 0, [built], Manifest(shape=shape)))
    write(tmp_path / "c", shape, weights(built))
    written = contents(tmp_path / "c")
    modules = [
        f"decoder.layers.{i}.{EXTRAS[s]}" for i, s in enumerate(shape.hybrid_layer_pattern) if s in EXTRAS
    ]
    extras = {f"{module}._extra_state/shard_0_1": None for module in [*modules, "decoder.final_norm"]}
    assert not real.keys() & extras.keys()
    assert written == real | extras


def test_objects_are_those_of_megatron(tmp_path: Path) -> None:
    """Both files are read as torch reads them: a list of one object, the common state or ``None``."""
    built = model(MODELS["all blocks"], 1)
    real = distributed.save(tmp_path / "real", 0, [built], Manifest(shape=MODELS["all blocks"]))
    write(tmp_path / "c", MODELS["all blocks"], weights(built))
    keys = [key for key, entry in contents(real).items() if entry is None]

    def objects(folder: Path) -> dict[str, Any]:
        out = dict.fromkeys(keys)
        dcp.load(out, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        return out

    assert objects(tmp_path / "c") == objects(real)
    assert objects(real)["common_state/shard_0_1"] == [{"state": {}}]


@st.composite
def shapes(draw: st.DrawFn) -> ParentShape:
    groups = draw(st.integers(1, 3))
    return SHAPE.override(
        hybrid_layer_pattern=draw(st.text("M*E-", min_size=1, max_size=4)),
        tie_embeddings=draw(st.booleans()),
        hidden_size=draw(st.integers(1, 7)),
        vocab_size=draw(st.integers(1, 40)),
        ffn_hidden_size=draw(st.integers(1, 5)),
        num_moe_experts=draw(st.integers(2, 11)),
        moe_ffn_hidden_size=draw(st.integers(1, 5)),
        moe_shared_expert_intermediate_size=draw(st.integers(0, 3)),
        mamba_num_groups=groups,
        mamba_num_heads=groups * draw(st.integers(1, 3)),
        mamba_head_dim=draw(st.integers(1, 3)),
        mamba_state_dim=draw(st.integers(1, 3)),
    )


@settings(max_examples=60, deadline=None)
@given(
    shapes(),
    st.sampled_from([(torch.float32,), (torch.bfloat16,), (torch.bfloat16, torch.float32)]),
    st.integers(1, 400),
    st.integers(1, 5),
)
def test_torch_reads_every_row_where_megatron_keeps_it(
    shape: ParentShape, dtypes: tuple[torch.dtype, ...], chunk_bytes: int, files: int
) -> None:
    state = random_state(shape, dtypes)
    if len(dtypes) > 1:  # the experts of a layer are one tensor
        state = {n: v.float() if "local_experts" in n else v for n, v in state.items()}
    expected = by_key(shape, state)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), shape, state, chunk_bytes=chunk_bytes, files=files)
        entries = {key: entry for key, entry in contents(Path(folder)).items() if entry is not None}
        found = {key: torch.full(size, torch.nan, dtype=dtype) for key, (size, dtype) in entries.items()}
        dcp.load(found, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


@settings(max_examples=30, deadline=None)
@given(shapes(), st.integers(1, 400), st.integers(1, 4))
def test_no_more_rows_are_asked_for_or_held_than_a_chunk_a_file(
    shape: ParentShape, chunk_bytes: int, files: int
) -> None:
    """Rows lie in buffers that die with the last tensor on them."""

    class Rows(bytearray):
        pass

    alive, most, progressed = 0, 0, []
    lock = threading.Lock()
    asked = {t.name: 0 for t in model_tensors(shape)}

    def count(n: int) -> None:
        nonlocal alive, most
        with lock:
            alive += n
            most = max(most, alive)

    def rows(tensor: ModelTensor, start: int, stop: int) -> Tensor:
        row = 4 * prod(tensor.shape[1:])
        assert start < stop and (stop - start == 1 or (stop - start) * row <= chunk_bytes)
        asked[tensor.name] += stop - start
        buffer = Rows((stop - start) * row)
        count(1)
        weakref.finalize(buffer, count, -1)
        return torch.frombuffer(buffer, dtype=torch.float32).view(stop - start, *tensor.shape[1:])

    tensors = [(t, torch.float32) for t in model_tensors(shape)]
    with tempfile.TemporaryDirectory() as folder:
        write_torch_dist(
            Path(folder), tensors, rows, files=files, chunk_bytes=chunk_bytes, progress=progressed.append
        )
    assert alive == 0 and 1 <= most <= files
    assert asked == {t.name: t.shape[0] for t, _ in tensors}
    assert sum(progressed) == 4 * sum(prod(t.shape) for t, _ in tensors)


def test_digests_are_those_of_the_files_and_spare_the_seal_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = random_state(SHAPE)
    write(tmp_path, SHAPE, state, files=3, chunk_bytes=500)
    digests = json.loads((tmp_path / "digests.0.json").read_text())
    assert digests == {
        file.name: [file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest()]
        for file in tmp_path.glob("*.distcp")
    }
    assert sorted(digests) == ["__0_0.distcp", "__0_1.distcp", "__0_2.distcp"]
    read = []
    entry = integrity._entry
    monkeypatch.setattr(integrity, "_entry", lambda file: (read.append(file.name), entry(file))[1])
    integrity.seal(tmp_path)
    assert sorted(read) == [".metadata", "elastic.json", "metadata.json"]
    integrity.verify(tmp_path)


def test_files_hold_about_as_many_bytes_each_and_little_else(tmp_path: Path) -> None:
    """The rows given are views of whole tensors; beside its bytes a chunk takes less than 2 KiB."""
    state = random_state(WIDE)
    write(tmp_path, WIDE, state, files=4, chunk_bytes=CHUNK)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    held = {file.name: [] for file in tmp_path.glob("*.distcp")}
    for key, entry in metadata.state_dict_metadata.items():
        for box in getattr(entry, "chunks", ()):
            place = metadata.storage_data[dcp.metadata.MetadataIndex(key, box.offsets)]
            assert place.length < 4 * prod(box.sizes) + 2048
            held[place.relative_path].append(4 * prod(box.sizes))
    sizes = [sum(sizes) for sizes in held.values()]
    assert len(sizes) == 4 and sum(sizes) == sum(v.nbytes for v in state.values())
    assert max(sizes) - min(sizes) <= 2 * CHUNK


@pytest.mark.parametrize("number", [0, 1])
def test_a_full_disk_is_an_os_error(number: int, tmp_path: Path) -> None:
    (tmp_path / f"__0_{number}.distcp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write(tmp_path, WIDE, random_state(WIDE), files=2)  # rows larger than a file's buffer


def test_an_error_that_does_not_return_keeps_its_kind() -> None:
    """torch would make a ``RuntimeError`` without the reason of it; a disk that stays full fails again on closing."""

    class Broken(io.BytesIO):
        def write(self, data: Buffer, /) -> int:
            if self.tell() > 100:
                raise OSError(errno.EIO, "Input/output error")
            return super().write(data)

    with pytest.raises(OSError, match="Input/output error"):
        _Stream(Broken()).save(torch.ones(100_000))


def test_the_first_failure_stops_every_file(tmp_path: Path) -> None:
    """Of two files the second fails at once, while the first has rows to read for seconds."""
    tensors = [(t, torch.float32) for t in model_tensors(WIDE)]
    failed, after = threading.Event(), []

    def rows(tensor: ModelTensor, start: int, stop: int) -> Tensor:
        if tensor.name == "output_layer.weight":
            failed.set()
            raise ValueError("no rows")
        assert failed.wait(60)
        time.sleep(0.01)
        after.append(start)
        return torch.zeros(stop - start, *tensor.shape[1:])

    with pytest.raises(ValueError, match="no rows"):
        write_torch_dist(tmp_path, tensors, rows, files=2, chunk_bytes=CHUNK)
    assert len(after) < 100 < WIDE.vocab_size * WIDE.hidden_size * 4 // CHUNK
    assert not (tmp_path / ".metadata").exists() and not (tmp_path / "metadata.json").exists()


def test_settings_of_torch_stay_as_they_were(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        write(tmp_path, SHAPE, random_state(SHAPE))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.serialization.get_crc32_options()
