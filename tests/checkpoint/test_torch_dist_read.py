"""Rows of a ``torch_dist`` checkpoint are those that were saved, whatever the chunks, and only they are read."""

from __future__ import annotations

import gc
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hf_models import parent, random_state, same
from hypothesis import given, settings
from hypothesis import strategies as st
from saved_models import student, whole
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch_dist_by_hand import Cuts, archive, keys_of_megatron, write_by_hand

from elastic_megatron.checkpoint import torch_dist
from elastic_megatron.checkpoint.distributed import save
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.torch_dist import DistFiles, open_torch_dist
from elastic_megatron.space import ParentShape

PATTERN = "MEM*E-"


@st.composite
def grids(draw: st.DrawFn) -> tuple[Tensor, Cuts]:
    """A tensor of one to three dimensions, and where each is cut."""
    cuts = [draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)) for _ in range(draw(st.integers(1, 3)))]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randn([sum(parts) for parts in cuts], generator=generator).to(dtype), cuts


@settings(max_examples=150, deadline=None)
@given(st.data(), grids(), st.integers(1, 3), st.sampled_from([1, 4 << 20]))
def test_rows_are_the_rows_of_the_whole_tensor_whatever_the_chunks(
    data: st.DataObject, grid: tuple[Tensor, Cuts], files: int, buffer: int
) -> None:
    tensor, cuts = grid
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_dist, "_BUFFER", buffer)
        write_by_hand(Path(folder), {"other": torch.ones(3), "w": tensor}, {"w": cuts}, files=files)
        opened = DistFiles(Path(folder))
        assert (opened.entries["w"].shape, opened.entries["w"].dtype) == (tuple(tensor.shape), tensor.dtype)
        stacked = tensor.dim() > 1 and data.draw(st.booleans())
        rows = tensor.flatten(0, 1) if stacked else tensor
        start = data.draw(st.integers(0, len(rows)))
        stop = data.draw(st.integers(start, len(rows)))
        out = torch.full_like(rows[start:stop], 77)
        opened.read("w", start, out)
        assert torch.equal(out, rows[start:stop])


def test_checkpoints_by_hand_are_what_torch_reads(tmp_path: Path) -> None:
    tensor, cuts = torch.randn(7, 5, 6), [[3, 4], [5], [1, 2, 3]]
    write_by_hand(tmp_path, {"w": tensor}, {"w": cuts}, files=2)
    target = {"w": torch.zeros(7, 5, 6)}
    dcp.load(target, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    assert torch.equal(target["w"], tensor)


@pytest.fixture(params=[True, False], ids=["crc", "no crc"])
def crc(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.serialization.set_crc32_options(request.param)
    yield
    torch.serialization.set_crc32_options(True)


@pytest.mark.usefixtures("crc")
def test_what_torch_itself_writes_is_read(tmp_path: Path) -> None:
    base = torch.randn(9, 4)
    # a view into a larger storage, a parameter, one value, none
    state = {"view": base[2:7], "parameter": torch.nn.Parameter(base), "one": base[0, :1], "none": base[:0]}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    opened, by_hand = DistFiles(tmp_path), []
    for key in ("view", "parameter"):  # which torch's writer takes out of its storage, and of its parameter
        write_by_hand(tmp_path / key, {key: state[key]}, saved=lambda _, key=key: archive(state[key]))
        by_hand.append((DistFiles(tmp_path / key), key))
    for files, key in [(opened, key) for key in state] + by_hand:
        out = torch.empty(files.entries[key].shape)
        files.read(key, 0, out)
        assert torch.equal(out, state[key]), key


@pytest.mark.parametrize(
    ("dtype", "distributed"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True)]
)
def test_a_megatron_checkpoint_holds_the_tensors_of_its_model(
    tmp_path: Path, dtype: torch.dtype, distributed: bool
) -> None:
    trained = student(PATTERN, dtype=dtype, distributed=distributed)
    folder = save(tmp_path, 3, trained.chunks, trained.manifest, optimizer=trained.optimizer)
    opened = open_torch_dist(folder, Manifest.read(folder / "elastic.json"), None)
    truth = {
        name: tensor
        for name, tensor in trained.chunks[0].state_dict().items()
        if isinstance(tensor, Tensor) and not name.startswith("budget_router.")
    }
    assert list(opened.state()) and same(dict(opened.state()), truth)
    assert {n for n, t in truth.items() if t.dtype is torch.float32} >= {
        n for n in truth if n.endswith("expert_bias")
    }
    by_megatron = whole(folder)
    assert opened.files.entries.keys() == by_megatron.keys()
    assert any(key.startswith("optimizer.") for key in by_megatron)
    for key, tensor in by_megatron.items():
        out = torch.empty(opened.files.entries[key].shape, dtype=opened.files.entries[key].dtype)
        opened.files.read(key, 0, out)
        assert torch.equal(out, tensor), key


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all reads."""
    sizes: list[int] = []
    read = os.preadv

    def counted(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        sizes.append(n := read(descriptor, buffers, offset))
        return n

    monkeypatch.setattr(os, "preadv", counted)
    return sizes


def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path, reads: list[int]) -> None:
    tensor = torch.randn(4096, 512)  # 8 MB
    write_by_hand(tmp_path, {"w": tensor, "cut": tensor}, {"cut": [[4096], [200, 312]]})
    opened, out = DistFiles(tmp_path), torch.empty(3, 512)
    assert not reads
    for key, chunks in (("w", 1), ("cut", 2)):
        opened.read(key, 2000, out)
        assert torch.equal(out, tensor[2000:2003])
        assert sum(reads) <= out.nbytes + chunks * 4096
        reads.clear()
        opened.read(key, 4093, out)
        assert torch.equal(out, tensor[4093:]) and sum(reads) == out.nbytes and len(reads) == chunks
        reads.clear()


def test_a_column_cut_chunk_is_read_through_a_small_buffer(tmp_path: Path, reads: list[int]) -> None:
    tensor = torch.randn(8192, 513)  # 17 MB
    write_by_hand(tmp_path, {"cut": tensor}, {"cut": [[8192], [300, 213]]})
    out = torch.empty_like(tensor)
    DistFiles(tmp_path).read("cut", 0, out)
    assert torch.equal(out, tensor) and max(reads) <= 4 << 20 and len(reads) < 20


def test_rows_that_a_chunk_holds_whole_are_read_without_a_buffer(tmp_path: Path, reads: list[int]) -> None:
    tensor = torch.randn(8192, 513)
    write_by_hand(tmp_path, {"w": tensor}, {"w": [[5000, 3192], [513]]})
    out = torch.empty_like(tensor)
    DistFiles(tmp_path).read("w", 0, out)
    assert torch.equal(out, tensor) and sorted(reads)[-2:] == [3192 * 513 * 4, 5000 * 513 * 4]


def test_threads_read_what_one_reads_with_few_files_open(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(31, 17) for i in range(90)}
    write_by_hand(tmp_path, tensors, {key: [[13, 18], [8, 9]] for key in tensors}, files=80)
    before = len(os.listdir("/proc/self/fd"))
    opened = DistFiles(tmp_path)

    def work(i: int, opened: DistFiles = opened) -> bool:
        key, start = f"t{i * 7 % 90}", i % 29
        out = torch.empty(2, 17)
        opened.read(key, start, out)
        return torch.equal(out, tensors[key][start : start + 2])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(2000)))
    assert len(os.listdir("/proc/self/fd")) <= before + 64
    del opened, work
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_opening_reads_no_tensor_and_reading_one_does_not_look_at_the_others(
    tmp_path: Path, reads: list[int]
) -> None:
    shape = parent()
    state = random_state(shape)
    dist = keys_of_megatron(state, shape)
    write_by_hand(tmp_path, dist | {f"optimizer.state.exp_avg.{k}": t for k, t in dist.items()})
    opened = open_torch_dist(tmp_path, Manifest(shape=shape), tmp_path)
    assert not reads and opened.side_files == tmp_path
    name = "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight"
    assert torch.equal(opened.rows(opened.tensors[name], 1, 4), state[name][1:4])
    assert len(reads) == 3  # both ends of an archive, the rows


# Writers differ in names


def renamed(pattern: str, name: str) -> Callable[[dict[str, Tensor], ParentShape], dict[str, Tensor]]:
    return lambda dist, _: {re.sub(pattern, name, key): tensor for key, tensor in dist.items()}


def one_key_an_expert(name: str) -> Callable[[dict[str, Tensor], ParentShape], dict[str, Tensor]]:
    def change(dist: dict[str, Tensor], _: ParentShape) -> dict[str, Tensor]:
        out = {}
        for key, tensor in dist.items():
            experts = tensor if ".experts.experts." in key else [tensor]
            for e, part in enumerate(experts):
                local = key.replace(".experts.experts.", f".experts.{name.format(e=e)}")
                out[local + str(e) if name == "" and ".experts.experts." in key else local] = part
        return out

    return change


def unsplit(dist: dict[str, Tensor], _: ParentShape) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for key, tensor in dist.items():
        key = re.sub(r"(in_proj\.weight|conv1d\.\w+)\.\w+$", r"\1", key)
        out[key] = torch.cat([out[key], tensor]) if key in out else tensor
    return out


def padded(dist: dict[str, Tensor], _: ParentShape) -> dict[str, Tensor]:
    ends = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {k: torch.cat([t, t.new_ones(9, t.shape[1])]) if k in ends else t for k, t in dist.items()}


OTHERS = {
    "Megatron": renamed("^", ""),
    "module.": renamed("^", "module."),
    "model.": renamed("^", "model."),
    "unfused norms": renamed(r"(mixer\.in_proj|self_attention\.linear_qkv|mlp\.linear_fc1)\.layer_norm_weight",
                             "norm.weight"),
    "norms of transformer layers": renamed(r"(self_attention\.linear_qkv|mlp\.linear_fc1)\.layer_norm_weight",
                                           "input_layernorm.weight"),
    "final_layernorm": renamed("final_norm", "final_layernorm"),
    "conv1d_weight": renamed(r"conv1d\.", "conv1d_"),
    "unsplit": unsplit,
    "unsplit conv1d_weight": lambda d, s: renamed(r"conv1d\.", "conv1d_")(unsplit(d, s), s),
    "local experts": one_key_an_expert("local_experts.{e}."),
    "own experts": one_key_an_expert("experts.{e}."),
    "grouped experts": one_key_an_expert(""),
    "padded vocabulary": padded,
}  # fmt: skip


@pytest.mark.parametrize("writer", OTHERS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_writers_names_lead_to_the_same_model(tmp_path: Path, writer: str, tied: bool) -> None:
    shape = parent(tie_embeddings=tied)
    state = random_state(shape, dtype=torch.bfloat16)
    for name in state:
        if name.endswith(("expert_bias", "A_log")):
            state[name] = state[name].float()
    own = {"budget_router.heads.x.weight": torch.ones(3)}
    dist = OTHERS[writer](keys_of_megatron(state, shape) | own, shape)
    beside = {
        f"{kind}.{k}": torch.ones(2)
        for k in dist
        for kind in ("optimizer.state.exp_avg", "chained_1.optimizer")
    }
    beside["decoder.layers.0.mixer._extra_state"] = torch.ones(1)
    write_by_hand(
        tmp_path, dist | beside, objects=["rng_state/shard_0.0_1.1", "common_state/shard_0_1"], files=3
    )
    assert same(dict(open_torch_dist(tmp_path, Manifest(shape=shape), None).state()), state)


def test_experts_and_columns_may_be_cut_at_once(tmp_path: Path) -> None:
    shape = parent()
    state = random_state(shape)
    dist = keys_of_megatron(state, shape)
    cuts = {key: [[5, 3], [4, 3, 5], [7, 9]] for key in dist if "experts.experts.linear_fc1" in key}
    cuts |= {key: [[1] * 8, [16], [5, 7]] for key in dist if "experts.experts.linear_fc2" in key}
    write_by_hand(tmp_path, dist, cuts, files=4)
    opened = open_torch_dist(tmp_path, Manifest(shape=shape), None)
    assert len(cuts) == 4 and same(dict(opened.state()), state)
