"""Append-only files of equal records, found by a 128-bit key, mapped into memory and checked when they are read.

A file is a head of 32 bytes (magic, bytes of a payload) and records of a head (key, CRC-32 of key and payload) and a
payload, each filled up to a multiple of 32 bytes. One process writes a file, from its first byte, and changes nothing
of it. So a process that is killed leaves at most one record that is not whole, and one whose bytes were damaged is not
taken for a record.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

KEY_BYTES = 16
SUFFIX = ".records"
_ALIGN = 32
_FILE_HEAD = struct.Struct("<8sQ16x")
_HEAD = struct.Struct("<16sI12x")
_MAGIC = b"EMREC001"
_OPEN_FILES = 64

# file name -> bytes of a payload, and the keys of its records one after another
Listing = dict[str, tuple[int, bytes]]


def listing(folder: Path) -> Listing:
    """What lies in a folder: one pass over the heads of its records. Other files are left alone."""
    out: Listing = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        size = path.stat().st_size
        payload = _payload_bytes(path)
        if payload is None or (rows := (size - _ALIGN) // _record_bytes(payload)) <= 0:
            continue
        heads = np.memmap(path, np.uint8, "r", _ALIGN, (rows, _record_bytes(payload)))
        out[path.name] = payload, heads[:, :KEY_BYTES].tobytes()
    return out


class Records:
    """The records of a folder as they were listed, and a file of one's own for new ones.

    Args:
        listed: by ``listing``, once for all processes that must find the same.
    """

    def __init__(self, folder: Path, listed: Mapping[str, tuple[int, bytes]]) -> None:
        self.folder = folder
        self._places: dict[tuple[bytes, int], list[tuple[str, int]]] = {}
        for name, (payload, keys) in listed.items():
            for row in range(len(keys) // KEY_BYTES):
                key = keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]
                self._places.setdefault((key, payload), []).append((name, row))
        self._written: set[tuple[bytes, int]] = set()
        self._files: dict[int, Path] = {}

    def __contains__(self, key_and_size: tuple[bytes, int]) -> bool:
        """Is there a record with a key and a payload of so many bytes, whole or not?"""
        return key_and_size in self._places

    def get(self, key: bytes, size: int) -> np.ndarray | None:
        """The payload [size] (uint8) of a record, in mapped memory; ``None`` where none is whole."""
        for name, row in self._places.get((key, size), ()):
            try:
                record = _mapped(self.folder / name, size)[row]
            except (OSError, IndexError, ValueError):  # removed or cut short since
                continue
            stored, check = _HEAD.unpack(record[: _HEAD.size].tobytes())
            payload = record[_HEAD.size : _HEAD.size + size]
            if stored == key and check == _check(key, [payload]):
                return payload
        return None

    def append(self, key: bytes, parts: Iterable[np.ndarray]) -> None:
        """Write a record, unless this object did already; its payload is the bytes of the parts.

        Visible to those that list the folder afterwards. Raises ``OSError`` where it cannot be written.
        """
        payload = b"".join(np.ascontiguousarray(part).tobytes() for part in parts)
        if (key, len(payload)) in self._written:
            return
        record = _HEAD.pack(key, _check(key, [payload])) + payload
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._files.setdefault(len(payload), self.folder / f"{uuid.uuid4().hex}{SUFFIX}")
        with path.open("ab") as file:
            if file.tell() == 0:
                file.write(_FILE_HEAD.pack(_MAGIC, len(payload)))
            file.write(record.ljust(_record_bytes(len(payload)), b"\0"))
        self._written.add((key, len(payload)))


def _record_bytes(payload: int) -> int:
    return -(-(_HEAD.size + payload) // _ALIGN) * _ALIGN


def _payload_bytes(path: Path) -> int | None:
    """Bytes of a payload; ``None`` where the file does not begin as one of ours."""
    with path.open("rb") as file:
        head = file.read(_FILE_HEAD.size)
    if len(head) < _FILE_HEAD.size:
        return None
    magic, payload = _FILE_HEAD.unpack(head)
    return payload if magic == _MAGIC else None


@lru_cache(maxsize=_OPEN_FILES)
def _mapped(path: Path, payload: int) -> np.ndarray:
    size = _record_bytes(payload)
    rows = (path.stat().st_size - _ALIGN) // size
    return np.memmap(path, np.uint8, "r", _ALIGN, (rows, size))


def _check(key: bytes, parts: Iterable[bytes | np.ndarray]) -> int:
    value = zlib.crc32(key)
    for part in parts:
        value = zlib.crc32(part, value)
    return value
