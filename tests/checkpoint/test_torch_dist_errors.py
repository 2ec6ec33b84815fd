"""What is no sound ``torch_dist`` checkpoint of the model is refused in one line, and nothing of it is dropped."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import parent, random_state
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties
from torch_dist_by_hand import Cuts, archive, boxes, edit, keys_of_megatron, write_by_hand

from elastic_megatron.checkpoint.dist_metadata import is_tiling
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.torch_dist import DistFiles, open_torch_dist
from elastic_megatron.errors import UserError

REMEDY = "copy it again, or restore it from a backup"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shape = parent()
    write_by_hand(tmp_path / "c", keys_of_megatron(random_state(shape), shape), files=2)
    return tmp_path / "c"


def reject(folder: Path, *words: str, read: bool = False) -> None:
    with pytest.raises(UserError) as caught:
        opened = open_torch_dist(folder, Manifest(shape=parent()), None)
        assert read, "opened"
        dict(opened.state())
    assert "\n" not in str(caught.value)
    for word in (str(folder), *words):
        assert word in str(caught.value), f"{word!r} is not in {caught.value}"


def rewritten(
    folder: Path, change: Callable[[dict[str, Tensor]], object], cuts: dict[str, Cuts] | None = None
) -> Path:
    dist = keys_of_megatron(random_state(parent()), parent())
    change(dist)
    shutil.rmtree(folder)
    write_by_hand(folder, dist, cuts)
    return folder


NORM = "decoder.layers.0.mixer.in_proj.layer_norm_weight"


@pytest.mark.parametrize(
    "key",
    ["mtp.layers.0.eh_proj.weight", "decoder.layers.1.mlp.fc1_latent_proj.weight", "decoder.layers.7.norm.weight",
     "decoder.layers.0.norm.weight", "decoder.layers.3.self_attention.linear_qkv.bias", "optimizer_weight",
     "embedding.position_embeddings.weight", "decoder.layers.0.mixer.in_proj.weight",
     "decoder.layers.0.mixer.in_proj.weight_quantizer._amax"],
)  # fmt: skip
def test_a_tensor_of_no_block_is_refused_by_name(folder: Path, key: str) -> None:
    reject(
        rewritten(folder, lambda d: d.update({key: torch.ones(4)})),
        repr(key),
        "1 unknown",
        "save the checkpoint without",
    )


@pytest.mark.parametrize("key", [NORM, "output_layer.weight", "decoder.layers.0.mixer.in_proj.weight.dt",
                                 "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"])  # fmt: skip
def test_a_missing_tensor_is_named(folder: Path, key: str) -> None:
    reject(rewritten(folder, lambda d: d.pop(key)), repr(key), "is missing", REMEDY)


@pytest.mark.parametrize(
    ("key", "size", "words"),
    [(NORM, [17], "[17], the description of the model says [16]"),
     ("decoder.layers.1.mlp.experts.experts.linear_fc1.weight", [7, 12, 16], "[7, 12, 16], the description of the model says [8, 12, 16]"),
     ("decoder.layers.1.mlp.experts.experts.linear_fc1.weight", [96, 16], "[96, 16], the description of the model says [8, 12, 16]"),
     ("output_layer.weight", [19, 16], "[19, 16], the description of the model says [20, 16]"),
     ("output_layer.weight", [24, 15], "[24, 15], the description of the model says [20, 16]")],
)  # fmt: skip
def test_a_tensor_of_another_shape_is_refused(folder: Path, key: str, size: list[int], words: str) -> None:
    reject(
        rewritten(folder, lambda d: d.update({key: torch.ones(size)})), repr(key), words, "different models"
    )


@pytest.mark.parametrize(
    ("key", "dtype", "words"),
    [(NORM, torch.float64, "dtype float64"), ("output_layer.weight", torch.float8_e4m3fn, "dtype float8_e4m3fn"),
     ("decoder.layers.0.mixer.in_proj.weight.x", torch.int16, "dtype int16")],
)  # fmt: skip
def test_other_dtypes_are_refused(folder: Path, key: str, dtype: torch.dtype, words: str) -> None:
    changed = rewritten(folder, lambda d: d.update({key: d[key].to(dtype)}))
    reject(changed, repr(key), words, "in BF16, FP16 or FP32")


def test_fused_rows_of_several_ranks_are_refused_because_they_interleave(folder: Path) -> None:
    key = "decoder.layers.2.mixer.in_proj.weight"

    def fuse(dist: dict[str, Tensor]) -> None:
        dist[key] = torch.cat([dist.pop(f"{key}.{label}") for label in ("z", "x", "B", "C", "dt")])

    rewritten(folder, fuse, {key: [[84], [8, 8]]})
    open_torch_dist(folder, Manifest(shape=parent()), None)
    reject(
        rewritten(folder, fuse, {key: [[42, 42], [16]]}),
        repr(key),
        "interleaved by rank",
        "1 tensor-parallel rank",
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, ["metadata.json is missing", "a Megatron checkpoint?"]),
     ('{"sharded_backend": "zarr"}', ["'zarr'", "save it with Megatron as 'torch_dist'"]),
     ('{"sharded_backend": "torch_dist", "sharded_backend_version": 2}', ["of version 2", "version 1"]),
     ("{}", ["a None checkpoint", "save it"]), ("[]", ["holds a list", REMEDY]), ("{", ["is no valid JSON", REMEDY])],
)  # fmt: skip
def test_another_kind_of_checkpoint_is_refused(folder: Path, content: str | None, words: list[str]) -> None:
    (folder / "metadata.json").unlink()
    if content is not None:
        (folder / "metadata.json").write_text(content)
    reject(folder, *words)


@pytest.mark.parametrize(
    ("content", "word"),
    [(None, "cannot be read (No such file or directory)"), (b"", "is damaged"), (b"\x80\x04junk", "is damaged"),
     (pickle.dumps({"a": 1}), "is damaged"), (pickle.dumps(Metadata({})), "is damaged")],
)  # fmt: skip
def test_damaged_metadata_is_refused(folder: Path, content: bytes | None, word: str) -> None:
    (folder / ".metadata").unlink()
    if content is not None:
        (folder / ".metadata").write_bytes(content)
    reject(folder, ".metadata", word, REMEDY)


def test_metadata_that_does_not_say_where_a_chunk_is_is_refused(folder: Path) -> None:
    edit(folder, lambda m: m.storage_data.pop(MetadataIndex(NORM, [0])))
    reject(folder, ".metadata does not say where", NORM, REMEDY)


def test_chunks_that_leave_a_hole_are_refused(folder: Path) -> None:
    rewritten(folder, lambda _: None, {NORM: [[3, 4, 9]]})
    edit(folder, lambda m: m.state_dict_metadata[NORM].chunks.pop(1))
    reject(folder, f"the chunks of {NORM!r} do not add up", REMEDY)


def test_chunks_that_overlap_are_refused_even_where_their_sizes_add_up(folder: Path) -> None:
    rewritten(folder, lambda _: None, {NORM: [[3, 4, 4, 5]]})

    def shift(metadata: Metadata) -> None:  # the second chunk onto the third, but for one row
        metadata.state_dict_metadata[NORM].chunks[1].offsets = torch.Size([6])
        metadata.storage_data[MetadataIndex(NORM, [6])] = metadata.storage_data[MetadataIndex(NORM, [3])]

    edit(folder, shift)
    reject(folder, f"the chunks of {NORM!r} do not add up to its shape, each place once", REMEDY)


@settings(max_examples=200)
@given(st.data(), st.lists(st.integers(0, 4), min_size=0, max_size=3))
def test_a_tiling_covers_each_place_once(data: st.DataObject, shape: list[int]) -> None:
    """By counting: boxes of a grid, some moved, grown, left out or doubled."""
    cuts = [data.draw(st.lists(st.integers(1, 2), max_size=3)) if n else [0] for n in shape]
    cuts = [[*c, n - sum(c)] if sum(c) < n else [n] for c, n in zip(cuts, shape, strict=True)]
    found = [(offsets, tuple(part.shape)) for offsets, part in boxes(torch.zeros(shape), cuts)]
    for _ in range(data.draw(st.integers(0, 2))):
        i = data.draw(st.integers(0, len(found) - 1)) if found else 0
        change = data.draw(st.sampled_from(["move", "grow", "leave out", "double"]))
        if change == "double":
            found += found[i : i + 1] * data.draw(st.integers(1, 2))
        elif change == "leave out":
            found = found[:i] + found[i + 1 :]
        elif found and shape:
            offsets, sizes = found[i]
            by = data.draw(st.tuples(*(st.integers(0, 1) for _ in shape)))
            moved = tuple(a + b for a, b in zip(offsets if change == "move" else sizes, by, strict=True))
            found[i] = (moved, sizes) if change == "move" else (offsets, moved)
    counts = torch.zeros([n + 8 for n in shape], dtype=torch.int64)
    for offsets, sizes in found:
        counts[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] += 1
    wanted = torch.zeros_like(counts)
    wanted[tuple(slice(0, n) for n in shape)] = 1
    assert is_tiling(shape, found) == torch.equal(counts, wanted)


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda p: replace(p, relative_path="../c/__0_0.distcp"), ["'../c/__0_0.distcp'", "no file of its folder"]),
     (lambda p: replace(p, relative_path="/etc/passwd"), ["'/etc/passwd'", "no file of its folder"]),
     (lambda p: replace(p, relative_path="a\n\udc80b"), [".metadata is damaged", "relative_path"]),
     (lambda p: replace(p, relative_path=7), [".metadata is damaged", "relative_path"]),
     (lambda p: replace(p, relative_path="fifo"), ["fifo is a FIFO"]),
     (lambda p: replace(p, relative_path="link"), ["link leads out of"]),
     (lambda p: replace(p, offset=-1), [".metadata is damaged", "offset"]),
     (lambda p: replace(p, offset=1.5), [".metadata is damaged", "offset"]),
     (lambda p: replace(p, offset=1 << 59), ["a part of", "ends at"]),
     (lambda p: replace(p, length=1 << 59), ["a part of", "ends at"]),
     (lambda p: replace(p, length=60), ["no torch archive of [16] values", "60 bytes"])],
)  # fmt: skip
def test_a_place_that_is_none_is_refused(
    folder: Path, change: Callable[[Any], Any], words: list[str]
) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to(folder.parent / "elsewhere")
    index = MetadataIndex(NORM, [0])
    edit(folder, lambda m: m.storage_data.update({index: change(m.storage_data[index])}))
    reject(folder, *words)


def test_a_size_that_no_file_has_room_for_is_refused(folder: Path) -> None:
    def grow(metadata: Metadata) -> None:
        item = metadata.state_dict_metadata["output_layer.weight"]
        item.size = item.chunks[0].sizes = torch.Size([1 << 40, 16])

    edit(folder, grow)
    reject(folder, "no torch archive of [1099511627776, 16] values")


@pytest.mark.parametrize("what", ["class", "field", "dtype", "property", "protocol"])
def test_what_a_later_torch_wrote_is_named_as_such(folder: Path, what: str) -> None:
    file = folder / ".metadata"
    content, words = file.read_bytes(), ""
    if what == "class":
        words, content = (
            "TensorStorageMetadatb",
            content.replace(b"TensorStorageMetadata", b"TensorStorageMetadatb"),
        )
    elif what == "field":
        words, content = "a Chunk with the field offsett", content.replace(b"offsets", b"offsett")
    elif what == "dtype":
        words, content = "torch.float33", content.replace(b"float32", b"float33")
    elif what == "protocol":
        words, content = "pickle protocol 9", b"\x80\x09" + content[2:]
    else:
        words, content = "tensors with 6 properties", content
        with pytest.MonkeyPatch.context() as patch:
            state = TensorProperties.__getstate__
            patch.setattr(TensorProperties, "__getstate__", lambda self: (*state(self), "new"))
            patch.setattr(TensorProperties, "__setstate__", lambda self, s: before(self, s[:5]))
            edit(folder, lambda _: None)
            content = file.read_bytes()
    file.write_bytes(content)
    reject(folder, words, f"which torch {torch.__version__} does not know: a later release wrote it")


before = TensorProperties.__setstate__


def test_chunks_of_an_extension_are_refused(folder: Path) -> None:
    edit(
        folder, lambda m: setattr(m.storage_data[MetadataIndex(NORM, [0])], "transform_descriptors", ["zstd"])
    )
    reject(folder, NORM, "['zstd']", "save the checkpoint without extensions")


def test_a_missing_or_shortened_file_is_named_before_anything_is_read(folder: Path) -> None:
    file = folder / "__1_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    reject(folder, str(file), f"has {len(content) - 1} bytes", f"ends at {len(content)}", REMEDY)
    file.unlink()
    reject(folder, f"{file} cannot be read (No such file or directory)", REMEDY)


def test_a_file_that_shrinks_later_is_named(folder: Path) -> None:
    opened = open_torch_dist(folder, Manifest(shape=parent()), None)
    for file in folder.glob("*.distcp"):
        os.truncate(file, 1000)
    with pytest.raises(UserError, match=r"__\d_0\.distcp ends before byte .*copy it again"):
        dict(opened.state())


def reordered(tensor: Tensor, change: Callable[[str, bytes], bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    """An archive whose records went through ``change``."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive(tensor))) as source, zipfile.ZipFile(out, "w", how) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return out.getvalue()


def as_safetensors(tensor: Tensor) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        writer = dcp.FileSystemWriter(folder, serialization_format=SerializationFormat.SAFETENSORS)
        dcp.save({"w": tensor}, storage_writer=writer, no_dist=True)
        return Path(folder, "__0_0.distcp").read_bytes()


LONG = "as long as any tensor here " * 200


class Harmful:
    def __reduce__(self) -> tuple[Callable[[], int], tuple[()]]:
        return os.getpid, ()


@pytest.mark.parametrize(
    ("saved", "words"),
    [(lambda t: b"junk" * 3000, ["is no torch archive", REMEDY]),
     (lambda t: b"", ["is no torch archive", REMEDY]),
     (lambda t: archive(t)[:-30], ["is no torch archive", REMEDY]),
     (as_safetensors, ["is in safetensors format; save it in torch's own format"]),
     (lambda t: archive(t.repeat(2, *[1] * (t.dim() - 1))), ["values of torch.float32 instead of", REMEDY]),
     (lambda t: archive(t.double()), ["values of torch.float64 instead of", REMEDY]),
     (lambda t: archive(torch.empty(*t.shape, 2)[..., 0]), ["its values lie apart, with strides", REMEDY]),
     (lambda t: archive({"a": LONG}), ["cannot be understood", REMEDY]),  # type: ignore[arg-type]
     (lambda t: archive((Harmful(), LONG)), ["getpid is no part of a tensor", REMEDY]),  # type: ignore[arg-type]
     (lambda t: reordered(t, lambda n, b: b"big" if n.endswith("byteorder") else b), ["big-endian", REMEDY]),
     (lambda t: reordered(t, lambda n, b: b[:-1] if "/data/" in n else b), ["its values have", REMEDY]),
     (lambda t: reordered(t, lambda n, b: b"" if n.endswith("data.pkl") else b), ["cannot be understood", REMEDY]),
     (lambda t: reordered(t, lambda n, b: b, zipfile.ZIP_DEFLATED), ["is compressed", REMEDY])],
)  # fmt: skip
def test_chunks_that_are_no_plain_tensor_are_refused(
    folder: Path, saved: Callable[[Tensor], bytes], words: list[str]
) -> None:
    shutil.rmtree(folder)
    write_by_hand(folder, keys_of_megatron(random_state(parent()), parent()), saved=saved)
    reject(folder, "__0_0.distcp: the tensor saved at byte 0", *words, read=True)


def test_every_damaged_byte_beside_the_values_is_refused_or_harmless(tmp_path: Path) -> None:
    tensor, out = torch.randn(9, 5), torch.empty(9, 5)
    write_by_hand(tmp_path, {"w": tensor})
    file = tmp_path / "__0_0.distcp"
    content = file.read_bytes()
    values = content.index(tensor.numpy().tobytes())
    refused = 0
    for i in range(len(content)):
        if not values <= i < values + tensor.nbytes:
            file.write_bytes(content[:i] + bytes([content[i] ^ 16]) + content[i + 1 :])
            try:
                DistFiles(tmp_path).read("w", 0, out.zero_())
            except UserError as e:
                assert str(file) in str(e)
                refused += 1
            else:
                assert torch.equal(out, tensor), i
    assert refused > 200
