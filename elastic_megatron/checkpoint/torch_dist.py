"""Read Megatron ``torch_dist`` checkpoints by rows: no process group, no model, no more memory than the rows asked for.

Such a checkpoint cuts each tensor into chunks, each saved by ``torch.save`` (a zip archive) at some place of some
``.distcp`` file; the pickled ``.metadata`` says where. ``torch.load`` would read a chunk whole, so where its values
begin is looked up in the archive, and rows are read from there.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files.json_files import read_object
from ..files.reading import open_regular
from .dist_metadata import Chunk, is_tiling, read_metadata
from .libraries import LibraryTorchDist
from .manifest import Manifest
from .raw import REMEDY, RawFiles
from .stored import DTYPES, Entry, Files, ModelTensor, Piece, StoredModel, model_tensors
from .torch_archive import find_values
from .torch_dist_names import dist_pieces

# what a column-cut chunk is read through
_BUFFER = 4 << 20
# before every key of the model: Megatron-LM, and wrappers that save their module
_PREFIXES = ("", "module.", "model.")
# keys of other writers besides the aliases in the table, by its names: experts saved as one process's own
_OWN_EXPERTS = {
    f"mlp.experts.local_experts.{{e}}.linear_fc{i}.weight": f"mlp.experts.experts.{{e}}.linear_fc{i}.weight"
    for i in (1, 2)
}
# tensors beside the model: what training keeps, and what no weight depends on
_NO_WEIGHT = re.compile(
    r"(chained_\d+\.)?optimizer\.|budget_router\.|rng_state|common_state|opt_param_scheduler|rerun_state_machine"
    r"|(.*\.)?_extra_state"
)
_VOCAB = "vocab_size"
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A box of a tensor, and the archive of its values: ``length`` bytes of ``file`` from ``at``."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    at: int
    length: int


class DistFiles:
    """The tensors of a checkpoint folder, those of the optimizer too, as ``Files``.

    Rows of a tensor [E, F, …] run along its first two dimensions where they are read into [n, …].

    Raises ``UserError`` where ``.metadata`` is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metadata = read_metadata(folder)
        self.entries = {
            key: Entry(tuple(tensor.size), tensor.properties.dtype)
            for key, tensor in self.metadata.tensors.items()
        }
        self._raw = RawFiles()
        self._grids: dict[str, tuple[list[StoredChunk], list[int], int]] = {}
        self._values: dict[tuple[Path, int], int] = {}

    def read(self, key: str, start: int, out: Tensor) -> None:
        """As ``Files.read``. Raises ``UserError`` also where chunks leave a row uncovered."""
        shape = self.entries[key].shape
        if out.dim() == len(shape):
            return self._read(key, None, start, out)
        row, end = 0, len(out)
        while row < end:  # one expert after another
            expert, first = divmod(start + row, shape[1])
            n = min(shape[1] - first, end - row)
            self._read(key, expert, first, out[row : row + n])
            row += n

    def reread(self) -> Files:
        """As ``Files.reread``."""
        return LibraryTorchDist(self.folder)

    def chunks(self, key: str) -> list[StoredChunk]:
        """The chunks of a tensor, in order of their rows. Raises ``UserError`` where ``.metadata`` is damaged."""
        return self._grid(key)[0]

    def check(self, keys: Iterable[str]) -> None:
        """Raises ``UserError`` where a file that holds a part of one of these is missing or too short."""
        sizes: dict[Path, int] = {}
        for key in keys:
            for chunk in self.chunks(key):
                if chunk.file not in sizes:
                    sizes[chunk.file] = _size(chunk.file, key)
                if chunk.at + chunk.length > sizes[chunk.file]:
                    raise UserError(
                        f"{chunk.file} has {sizes[chunk.file]} bytes, and a part of {key!r} ends at "
                        f"{chunk.at + chunk.length}; {REMEDY}"
                    )

    def _grid(self, key: str) -> tuple[list[StoredChunk], list[int], int]:
        """The chunks by their first row, these rows, and the largest extent along them."""
        if key not in self._grids:
            entry, found = self.entries[key], self.metadata.tensors[key].chunks
            chunks = [
                self._chunk(key, c) for c in sorted({c.offsets: c for c in found}.values(), key=_offsets)
            ]
            if not is_tiling(entry.shape, ((c.offsets, c.sizes) for c in chunks)):
                raise UserError(
                    f"{self.folder}: the chunks of {key!r} do not add up to its shape, each place once; {REMEDY}"
                )
            tops = [c.offsets[0] if c.offsets else 0 for c in chunks]
            longest = max((c.sizes[0] for c in chunks if c.sizes), default=0)
            self._grids[key] = chunks, tops, longest
        return self._grids[key]

    def _chunk(self, key: str, chunk: Chunk) -> StoredChunk:
        where = self.metadata.place(key, chunk.offsets)
        file = self.metadata.file(where)
        if where.transform_descriptors:
            raise UserError(
                f"{file} holds {key!r} transformed by {list(where.transform_descriptors)}, which cannot be read; "
                "save the checkpoint without extensions"
            )
        if prod(chunk.sizes) * self.entries[key].dtype.itemsize > where.length:
            raise UserError(
                f"{file}: the tensor saved at byte {where.offset} is no torch archive of {list(chunk.sizes)} values of "
                f"{key!r}, but {where.length} bytes; {REMEDY}"
            )
        return StoredChunk(chunk.offsets, chunk.sizes, file, where.offset, where.length)

    def _read(self, key: str, expert: int | None, start: int, out: Tensor) -> None:
        """Rows of a tensor, or of one expert of a stack of them."""
        chunks, tops, longest = self._grid(key)
        first, last = (start, start + len(out)) if expert is None else (expert, expert + 1)
        near = chunks[bisect.bisect_right(tops, first - longest) : bisect.bisect_left(tops, last)]
        filled = 0
        for chunk in near:
            offsets, sizes, skipped = chunk.offsets, chunk.sizes, 0
            if expert is not None:
                if not offsets[0] <= expert < offsets[0] + sizes[0]:
                    continue
                skipped = (expert - offsets[0]) * prod(sizes[1:])
                offsets, sizes = offsets[1:], sizes[1:]
            top, bottom = max(start, offsets[0]), min(start + len(out), offsets[0] + sizes[0])
            if top >= bottom:
                continue
            columns = (slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:], strict=True))
            target = out[(slice(top - start, bottom - start), *columns)]
            if target.numel():
                self._copy(key, chunk, skipped + (top - offsets[0]) * prod(sizes[1:]), target)
            filled += target.numel()
        if filled != out.numel():
            raise UserError(
                f"{self.folder}: chunks cover {filled} of {out.numel()} values of rows {start} to "
                f"{start + len(out)} of {key!r}; {REMEDY}"
            )

    def _copy(self, key: str, chunk: StoredChunk, first: int, target: Tensor) -> None:
        """Fill ``target`` with the values of a chunk from number ``first`` on."""
        entry, place = self.entries[key], (chunk.file, chunk.at)
        if place not in self._values:
            found = find_values(self._raw, *place, chunk.length, entry.dtype, prod(chunk.sizes))
            self._values[place] = found
        position = self._values[place] + first * entry.dtype.itemsize
        if target.is_contiguous():
            return self._raw.read(chunk.file, position, target)
        row_bytes = prod(target.shape[1:]) * entry.dtype.itemsize
        for rows in target.split(max(1, _BUFFER // row_bytes)):
            buffer = torch.empty(rows.shape, dtype=entry.dtype)
            self._raw.read(chunk.file, position, buffer)
            rows.copy_(buffer)
            position += buffer.nbytes


def open_torch_dist(folder: Path, manifest: Manifest, side_files: Path | None) -> StoredModel:
    """Open a checkpoint folder and check what it says of itself: names, shapes, dtypes, files, but no values.

    Args:
        side_files: as in ``StoredModel``.

    Raises ``UserError`` where it is of another kind, a tensor is missing, unknown, of another shape or quantised, or a
    file is missing or too short; nothing is dropped in silence.
    """
    check_backend(folder)
    files = DistFiles(folder)
    prefix = next((p for p in _PREFIXES if p + _EMBEDDING in files.entries), "")
    found = {t.name: _find(files, prefix, t) for t in model_tensors(manifest.shape)}
    used = {piece.key for pieces in found.values() for piece in pieces}
    if unknown := [
        key for key in files.entries if key not in used and not _NO_WEIGHT.match(key.removeprefix(prefix))
    ]:
        raise UserError(
            f"{folder}: tensor {unknown[0]!r} belongs to no block of pattern "
            f"{manifest.shape.hybrid_layer_pattern!r} ({len(unknown)} unknown); nothing is dropped in silence: save "
            "the checkpoint without it, or correct the description of the model"
        )
    files.check(used)
    return StoredModel(folder, manifest, files, lambda tensor: found[tensor.name], side_files)


def check_backend(folder: Path) -> None:
    """Raises ``UserError`` where a folder is no ``torch_dist`` checkpoint."""
    file = folder / "metadata.json"
    data = read_object(file, f"is {folder} a Megatron checkpoint?", REMEDY)
    backend, version = data.get("sharded_backend"), data.get("sharded_backend_version", 1)
    if (backend, version) != ("torch_dist", 1):
        raise UserError(
            f"{folder} is a {backend!r:.40} checkpoint of version {version!r:.40}; save it with Megatron as "
            "'torch_dist', version 1"
        )


def _size(file: Path, key: str) -> int:
    try:
        with open_regular(file) as f:
            return f.seek(0, 2)
    except OSError as e:
        raise UserError(
            f"{file} cannot be read ({e.strerror}), and holds a part of {key!r}; {REMEDY}"
        ) from None


def _offsets(chunk: Chunk) -> tuple[int, ...]:
    return chunk.offsets


def _find(files: DistFiles, prefix: str, tensor: ModelTensor) -> tuple[Piece, ...]:
    """The pieces of a tensor, checked."""
    missing: list[str] = []
    for pieces, shapes in _alternatives(prefix, tensor):
        missing += [p.key for p in pieces if p.key not in files.entries][:1]
        if all(p.key in files.entries for p in pieces):
            _check(files, tensor, pieces, shapes)
            return pieces
    raise UserError(
        f"{files.folder}: tensor {missing[0]!r} is missing, under other names too; {REMEDY}, or correct the "
        "description of the model"
    )


def _alternatives(
    prefix: str, tensor: ModelTensor
) -> Iterator[tuple[tuple[Piece, ...], list[tuple[int, ...]]]]:
    """Where a tensor may be, and the shapes it has there: as Megatron writes it, then as others do."""
    layout = tensor.layout
    names = (layout.dist or layout.name, layout.name, *layout.aliases, _OWN_EXPERTS.get(layout.name))
    for split in (True, False) if layout.split else (False,):
        for name in dict.fromkeys(n for n in names if n):
            pieces = dist_pieces(replace(tensor, layout=replace(layout, dist=name, split=split)))
            stacked = layout.per_expert and "{e}" not in name
            experts = (tensor.sizes["num_moe_experts"],) if stacked else ()
            yield (
                tuple(Piece(prefix + p.key, p.start if stacked else 0, p.rows) for p in pieces),
                [(*experts, p.rows, *tensor.shape[1:]) for p in pieces],
            )


def _check(
    files: DistFiles, tensor: ModelTensor, pieces: tuple[Piece, ...], shapes: list[tuple[int, ...]]
) -> None:
    """Raises ``UserError`` where pieces that are there are not those of this tensor."""
    padded = _VOCAB in tensor.layout.axes()  # Megatron rounds the vocabulary up; its first rows are ours
    for piece, wanted in zip(pieces, shapes, strict=True):
        found, what = files.entries[piece.key], f"{files.folder}: tensor {piece.key!r}"
        if found.shape != wanted and not (padded and found.shape[1:] == wanted[1:] and found.shape > wanted):
            raise UserError(
                f"{what} has shape {list(found.shape)}, the description of the model says {list(wanted)}; "
                "they belong to different models"
            )
        if found.dtype not in DTYPES:
            name = str(found.dtype).removeprefix("torch.")
            raise UserError(f"{what} has dtype {name}; save the weights in BF16, FP16 or FP32")
    if tensor.layout.split and len(pieces) == 1 and any(c.offsets[0] for c in files.chunks(pieces[0].key)):
        raise UserError(
            f"{files.folder}: tensor {pieces[0].key!r} is fused and cut, so its rows may be interleaved by rank; "
            "save it with 1 tensor-parallel rank, or with a later release of Megatron"
        )
