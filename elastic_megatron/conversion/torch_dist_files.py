"""Write a ``torch_dist`` checkpoint by rows: without process group and module, a few chunks in memory at a time.

Plan, metadata and record format are torch's (``torch.distributed.checkpoint``, ``torch.save``). Only the loop that
fills the files is here: that of torch's ``FileSystemWriter`` keeps every tensor of a file until the file is complete.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import ceil, prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ..checkpoint import integrity
from ..checkpoint.raw import begin_writing
from ..checkpoint.stored import ModelTensor
from ..checkpoint.torch_dist_names import dist_pieces
from .copy import Progress, single_threaded_torch, threads
from .disk import flush

Rows = Callable[[ModelTensor, int, int], Tensor]
# more leaves the caches between reading, hashing and writing
CHUNK = 8 << 20
# Megatron's loader asks for an object beside the weight of every linear (tried with the local spec). By Transformer
# Engine's spec (only read) it also asks for one of every norm that is not fused into a linear and of the attention
# core; whichever loads, an object that it does not ask for is ignored. The output layer has one where it is tied, too.
_STATE = "_extra_state"
_NO_LINEAR = ("mlp.router.weight",)
_MORE_STATES = {
    "self_attention.linear_qkv.weight": ("self_attention.core_attention",),
    "pre_mlp_layernorm.weight": ("pre_mlp_layernorm",),
    "decoder.final_norm.weight": ("decoder.final_norm", "output_layer"),
}
# weights alone: what training adds (step, optimizer, schedules) is empty
_COMMON = {"state": {}}


def write_torch_dist(
    folder: Path,
    tensors: Sequence[tuple[ModelTensor, torch.dtype]],
    rows: Rows,
    *,
    files: int | None = None,
    chunk_bytes: int = CHUNK,
    progress: Progress | None = None,
) -> None:
    """Write the shards, ``.metadata``, ``metadata.json`` and, for ``integrity.seal``, the digests of the shards.

    Args:
        folder: made where it is missing.
        tensors: every tensor of a model, with the dtype to store it in.
        rows: gives rows ``start`` to ``stop`` of a tensor in that dtype; called from several threads.
        files: shards, each written by a thread of its own; by default as many as a conversion has threads.
        chunk_bytes: the most that a thread holds at once, but at least one row.
        progress: called with the number of bytes written, from several threads.

    Raises ``OSError`` where a file cannot be written, and whatever ``rows`` raises.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

    folder.mkdir(parents=True, exist_ok=True)
    chunks = [chunk for tensor, dtype in tensors for chunk in _chunks(tensor, dtype, chunk_bytes)]
    objects = _objects([tensor for tensor, _ in tensors])
    plan = [chunk.item for chunk in chunks]
    plan += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]
    _, metadata = create_default_global_save_plan([SavePlan(plan)], rewrite_index_hints=False)
    shards = [
        _Shard(folder / f"__0_{number}.distcp", share, {} if number else objects)
        for number, share in enumerate(_shares(chunks, files or threads()))
    ]
    _write(shards, rows, progress)
    FileSystemWriter(folder).finish(metadata, [shard.written for shard in shards])
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))
    digests = {shard.file.name: (shard.size, shard.digest) for shard in shards}
    integrity.record(folder, 0, digests)
    flush(folder / "metadata.json")
    flush(folder)


@dataclass(frozen=True)
class _Chunk:
    """Rows ``start`` to ``stop`` of a tensor, which are one box of one key."""

    tensor: ModelTensor
    start: int
    stop: int
    dtype: torch.dtype
    box: torch.Size
    item: WriteItem

    @property
    def nbytes(self) -> int:
        return prod(self.box) * self.dtype.itemsize


def _chunks(tensor: ModelTensor, dtype: torch.dtype, limit: int) -> Iterator[_Chunk]:
    """A tensor in even stretches of rows, each of at most ``limit`` bytes or one row, in order."""
    inner = tensor.shape[1:]
    step = max(1, limit // (prod(inner) * dtype.itemsize))
    expert = () if tensor.expert is None else (tensor.expert,)
    experts = () if tensor.expert is None else (tensor.sizes["num_moe_experts"],)
    row = 0
    for piece in dist_pieces(tensor):
        whole = torch.Size((*experts, piece.rows, *inner))
        parts = ceil(piece.rows / step)
        for part in range(parts):
            first, last = part * piece.rows // parts, (part + 1) * piece.rows // parts
            offset = torch.Size((*expert, first, *(0 for _ in inner)))
            box = torch.Size((*(1 for _ in expert), last - first, *inner))
            data = TensorWriteData(ChunkStorageMetadata(offset, box), TensorProperties(dtype=dtype), whole)
            item = WriteItem(MetadataIndex(piece.key, offset), WriteItemType.SHARD, tensor_data=data)
            yield _Chunk(tensor, row + first, row + last, dtype, box, item)
        row += piece.rows


def _shares(chunks: Sequence[_Chunk], files: int) -> list[list[_Chunk]]:
    """Consecutive chunks of about as many bytes for each file, so that each reads its source in order."""
    total, done = sum(chunk.nbytes for chunk in chunks), 0
    shares: list[list[_Chunk]] = [[] for _ in range(files)]
    for chunk in chunks:
        shares[done * files // total].append(chunk)
        done += chunk.nbytes
    return [share for share in shares if share]


def _objects(tensors: Iterable[ModelTensor]) -> dict[str, bytes]:
    """What a checkpoint holds besides tensors: (key, pickled by ``torch.save``)."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    def key(name: str, of: int = 1, index: int = 0) -> str:
        return ShardedObject(name, None, (of,), (index,)).unique_key

    nothing = _pickled(None)
    out = {}
    for tensor in tensors:
        layout = tensor.layout
        modules = _MORE_STATES.get(layout.name, ()) if layout.dist is None else ()
        if layout.role == "matmul" and layout.name not in _NO_LINEAR:
            modules = (*modules, (layout.dist or layout.name).removesuffix(".weight"))
        shard = () if tensor.expert is None else (tensor.sizes["num_moe_experts"], tensor.expert)
        for module in modules:
            out[key(tensor.prefixed("decoder.layers", f"{module}.{_STATE}"), *shard)] = nothing
    return out | {key("common_state"): _pickled(_COMMON)}


def _pickled(content: object) -> bytes:
    """As Megatron writes a ``ShardedObject``: in a list, for several may have one key."""
    out = io.BytesIO()
    torch.save([content], out)
    return out.getvalue()


@dataclass
class _Shard:
    """A file of the checkpoint: what is to be written, then what has been."""

    file: Path
    chunks: Sequence[_Chunk]
    objects: Mapping[str, bytes]
    written: list[WriteResult] = field(default_factory=list)
    size: int = 0
    digest: str = ""

    def write(self, rows: Rows, stop: threading.Event, progress: Progress | None) -> None:
        """Fill the file and flush it to the disk; leave it incomplete once ``stop`` is set."""
        with open(self.file, "wb") as file:
            stream = _Stream(file)
            for key, data in self.objects.items():
                stream.write(data)
                self._add(MetadataIndex(key), stream)
            for chunk in self.chunks:
                if stop.is_set():
                    return
                stream.save(_data(chunk, rows))
                file.flush()
                begin_writing(file.fileno(), self.size, stream.size - self.size)
                self._add(chunk.item.index, stream)
                if progress is not None:
                    progress(chunk.nbytes)
            file.flush()
            os.fsync(file.fileno())
        self.digest = stream.sha256.hexdigest()

    def _add(self, index: MetadataIndex, stream: _Stream) -> None:
        """Note that ``index`` lies between the end of the last item and here."""
        length = stream.size - self.size
        # private in torch, but what its public reader expects and what Megatron's writer stores
        place = _StorageInfo(self.file.name, self.size, length)
        self.written.append(WriteResult(index, length, place))
        self.size = stream.size


def _data(chunk: _Chunk, rows: Rows) -> Tensor:
    """The rows of a chunk in a storage of their own: ``torch.save`` writes whole storages."""
    data = rows(chunk.tensor, chunk.start, chunk.stop).detach().contiguous()
    assert data.dtype == chunk.dtype and data.numel() == prod(chunk.box), chunk.tensor.name
    if data.untyped_storage().nbytes() != data.nbytes:
        data = data.clone()
    return data.view(chunk.box)


class _Stream:
    """Counts and hashes what goes into a file; ``torch.save`` writes from front to back and never seeks."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._error = file, None
        self.sha256, self.size = hashlib.sha256(), 0

    def save(self, data: Tensor) -> None:
        try:
            torch.save(data, self)
        except Exception:
            if self._error is not None:  # torch reports it without the reason
                raise self._error from None
            raise

    def write(self, data: bytes | memoryview) -> int:
        try:
            self.sha256.update(data)
            self._file.write(data)
        except OSError as e:
            self._error = e
            raise
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _write(shards: Sequence[_Shard], rows: Rows, progress: Progress | None) -> None:
    """All files at once, a thread each; the first failure stops all and is raised."""
    stop = threading.Event()

    def work(shard: _Shard) -> None:
        # SHA-256 covers the same bytes, and torch.load checks no CRC; torch keeps this option per thread
        torch.serialization.set_crc32_options(False)
        try:
            shard.write(rows, stop, progress)
        except BaseException:
            stop.set()
            raise

    with single_threaded_torch(), ThreadPoolExecutor(len(shards)) as pool:
        try:
            list(pool.map(work, shards))
        except BaseException:
            stop.set()
            raise
