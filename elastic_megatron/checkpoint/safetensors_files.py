"""Safetensors files read by rows. The library reads whole tensors, or maps the file (see ``raw``)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from .raw import REMEDY, RawFiles
from .stored import Entry

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER = 100_000_000  # the library's own limit


class SafetensorsFiles:
    """The tensors of safetensors files, as ``Files``.

    Raises ``UserError`` where a file is missing, cut short or no safetensors file, or two hold the same tensor.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self.where: dict[str, Path] = {}
        self._offsets: dict[str, int] = {}
        self._raw = RawFiles()
        for file in files:
            for name, (entry, offset) in read_header(file).items():
                if name in self.where:
                    raise UserError(
                        f"tensor {name!r} is in {self.where[name].name} and in {file}; remove one"
                    )
                self.entries[name], self.where[name], self._offsets[name] = entry, file, offset

    def read(self, key: str, start: int, out: Tensor) -> None:
        """As ``Files.read``."""
        entry = self.entries[key]
        row_bytes = prod(entry.shape[1:]) * entry.dtype.itemsize
        self._raw.read(self.where[key], self._offsets[key] + start * row_bytes, out)


def read_header(file: Path) -> dict[str, tuple[Entry, int]]:
    """(entry, offset in the file) of each tensor. Raises ``UserError`` where the file is damaged."""
    try:
        length = file.stat().st_size
        with open(file, "rb") as f:
            size = int.from_bytes(f.read(8), "little")
            if size > _MAX_HEADER:
                raise ValueError(f"a header of {size} bytes")
            text = f.read(size)
        if length < 8 + size or not text:
            raise UserError(f"{file} is truncated ({length} bytes do not hold its header); {REMEDY}")
        header: dict[str, Any] = json.loads(text)
        header.pop("__metadata__", None)
        found = {name: _entry(fields, 8 + size) for name, fields in header.items()}
    except OSError as e:
        raise UserError(f"{file} cannot be read ({e.strerror}); {REMEDY}") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{file} is no safetensors file ({type(e).__name__}: {e}); {REMEDY}") from None
    end = max((offset + _nbytes(entry) for entry, offset in found.values()), default=8 + size)
    if length != end:
        what = "is truncated" if length < end else "is damaged"
        raise UserError(f"{file} {what} ({length} bytes instead of {end}); {REMEDY}")
    return found


def _entry(fields: Any, base: int) -> tuple[Entry, int]:
    entry = Entry(tuple(int(n) for n in fields["shape"]), DTYPES[fields["dtype"]])
    start, stop = fields["data_offsets"]
    if stop - start != _nbytes(entry):
        raise ValueError(f"{stop - start} bytes for shape {list(entry.shape)}")
    return entry, base + start


def _nbytes(entry: Entry) -> int:
    return prod(entry.shape) * entry.dtype.itemsize
