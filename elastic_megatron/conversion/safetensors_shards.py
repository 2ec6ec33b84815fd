"""Write safetensors shards in place: headers first, then rows as they come, in any order."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.hf_read import INDEX, SINGLE
from ..checkpoint.raw import OpenFiles, as_bytes, begin_writing
from ..checkpoint.safetensors_files import DTYPES
from ..checkpoint.stored import Entry
from ..files.json_files import write_object

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class _Shard:
    """A file being written; ``missing`` counts the rows that have not come yet."""

    file: Path
    missing: int


class SafetensorsShards:
    """Files of at most ``max_bytes`` (a larger tensor has one of its own), and the index where there are several.

    Every shard is flushed to the disk by the thread that brings its last row, while others go on.

    Args:
        directory: an existing one.
        entries: every tensor, in the order of the shards.

    Raises ``OSError`` where the files cannot be written.
    """

    def __init__(self, directory: Path, entries: Mapping[str, Entry], max_bytes: int) -> None:
        self._entries, self._lock = entries, threading.Lock()
        self._place: dict[str, tuple[_Shard, int]] = {}
        self._shards: list[_Shard] = []
        self._files = OpenFiles(os.O_WRONLY)
        groups = list(_groups(entries, max_bytes))
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        names = names if len(groups) > 1 else [SINGLE]
        for name, group in zip(names, groups, strict=True):
            self._begin(directory / name, {key: entries[key] for key in group})
        if len(groups) > 1:
            where = {key: name for name, group in zip(names, groups, strict=True) for key in group}
            index = {"metadata": {"total_size": sum(map(nbytes, entries.values()))}, "weight_map": where}
            write_object(directory / INDEX, index, indent=2)

    def write(self, key: str, start: int, rows: Tensor) -> None:
        """Put rows of a tensor where they belong; each row comes once."""
        entry = self._entries[key]
        assert rows.dtype == entry.dtype and tuple(rows.shape[1:]) == entry.shape[1:], key
        shard, offset = self._place[key]
        buffer = as_bytes(rows)
        offset += start * prod(entry.shape[1:]) * entry.dtype.itemsize
        opened = self._files.get(shard.file)
        while buffer:
            n = os.pwrite(opened.descriptor, buffer, offset)
            begin_writing(opened.descriptor, offset, n)
            buffer, offset = buffer[n:], offset + n
        with self._lock:
            shard.missing -= len(rows)
            done = shard.missing == 0
        if done:
            os.fsync(opened.descriptor)
            self._files.forget(shard.file)

    def check(self) -> None:
        """Every row must have come."""
        incomplete = [shard.file.name for shard in self._shards if shard.missing]
        assert not incomplete, f"{incomplete[0]} lacks rows"

    def _begin(self, file: Path, entries: Mapping[str, Entry]) -> None:
        # like the library: by falling item size, so that every tensor is aligned to its own
        order = sorted(entries, key=lambda key: -entries[key].dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for key in order:
            entry, offsets[key] = entries[key], end
            end += nbytes(entry)
            header[key] = {
                "dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [offsets[key], end],
            }  # fmt: skip
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(file, "xb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + end)
        shard = _Shard(file, sum(entry.shape[0] if entry.shape else 1 for entry in entries.values()))
        self._shards.append(shard)
        self._place |= {key: (shard, 8 + len(text) + offset) for key, offset in offsets.items()}


def nbytes(entry: Entry) -> int:
    """Bytes of a stored tensor."""
    return prod(entry.shape) * entry.dtype.itemsize


def _groups(entries: Mapping[str, Entry], max_bytes: int) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for key, entry in entries.items():
        if group and size + nbytes(entry) > max_bytes:
            yield group
            group, size = [], 0
        group.append(key)
        size += nbytes(entry)
    yield group
