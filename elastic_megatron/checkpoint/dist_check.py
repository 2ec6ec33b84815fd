"""Before torch and Megatron load a ``torch_dist`` folder: that nothing in it makes them run code, or more than it says.

They unpickle ``.metadata`` and each object among the shards with all that Python's pickle can do (torch 2.13);
tensors and ``common.pt`` go through torch's ``weights_only``. So all of it is read here first, as data. They read the
files again afterwards: a folder that somebody changes in between is not covered.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..files.reading import inside
from . import unpickling
from .common_state import LEGACY
from .dist_metadata import DistMetadata, reading
from .raw import RawFiles
from .torch_archive import Archive, Stretch, find_values
from .torch_dist import DistFiles, check_backend
from .torch_objects import OBJECTS, SavedTensor

_STATE = "_extra_state"


def check_folder(folder: Path, rank: int = 0, world: int = 1) -> DistMetadata:
    """Read everything of a checkpoint folder but the values of its tensors, a share of it on each rank.

    Returns what its ``.metadata`` says.

    Raises ``UserError`` where a file is missing, damaged, says what is not so, or names anything that a checkpoint does
    not need.
    """
    check_backend(folder)
    files, raw = DistFiles(folder), RawFiles()
    files.check(files.entries)
    chunks = [(key, chunk) for key in files.entries for chunk in files.chunks(key)]
    for key, chunk in chunks[rank::world]:
        dtype, count = files.entries[key].dtype, prod(chunk.sizes)
        find_values(raw, chunk.file, chunk.at, chunk.length, dtype, count)
    for key in [*files.metadata.objects][rank::world]:
        place = files.metadata.place(key)
        _check_object(raw, files.metadata.file(place), place.offset, place.length, key)
    if rank == 0 and (folder / LEGACY).exists():
        file = inside(folder, LEGACY, folder)
        _check_object(raw, file, 0, file.stat().st_size, LEGACY)
    return files.metadata


def _check_object(raw: RawFiles, file: Path, start: int, length: int, key: str) -> None:
    with reading(file):
        archive = Archive(Stretch(raw, file, start, length))
        value = archive.load(OBJECTS)
        if _STATE in key:  # Transformer Engine unpickles the bytes of such a tensor
            for tensor in _tensors(value):
                if tensor.dtype is torch.uint8 and tensor.shape != (0,):
                    content = archive.content(f"data/{tensor.storage.record}", unpickling.SIZE_LIMIT)
                    unpickling.load(content[tensor.offset : tensor.offset + prod(tensor.shape)], OBJECTS)


def _tensors(value: Any) -> Iterator[SavedTensor]:
    if isinstance(value, SavedTensor):
        yield value
    elif isinstance(value, list):
        for item in value:
            if isinstance(item, SavedTensor):
                yield item
