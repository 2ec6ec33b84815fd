"""Safetensors files read by rows. The library reads whole tensors, or maps the file (see ``raw``).

Headers are the library's to judge: what it refuses is refused, what it takes is read as it reads it. It takes only
files whose tensors lie one after another without holes, so their places follow from their order and sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from ..files.reading import open_regular
from .libraries import LibrarySafetensors
from .raw import REMEDY, RawFiles
from .stored import Entry, Files

# all that the library gives to torch, and the scales of the MX formats, which torch knows by now
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# the library's own limit, at which it takes close to a GiB, is 100 MB; 100,000 tensors need 12
_MAX_HEADER = 16 << 20


class SafetensorsFiles:
    """The tensors of safetensors files, as ``Files``.

    Args:
        rename: what to call a tensor, for its name in the file.

    Raises ``UserError`` where a file is missing, cut short or no safetensors file, or two hold the same tensor.
    """

    def __init__(self, files: Iterable[Path], rename: Callable[[str], str] = str) -> None:
        self.entries: dict[str, Entry] = {}
        self.where: dict[str, Path] = {}
        self._offsets: dict[str, int] = {}
        self._raw, self._rename = RawFiles(), rename
        for file in files:
            for stored, (entry, offset) in read_header(file).items():
                name = rename(stored)
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

    def reread(self) -> Files:
        """As ``Files.reread``."""
        return LibrarySafetensors(dict.fromkeys(self.where.values()), self._rename)


def read_header(file: Path) -> dict[str, tuple[Entry, int]]:
    """(entry, offset in the file) of each tensor, in the order of the file.

    Raises ``UserError`` where the file is damaged, or a tensor has a dtype that torch does not.
    """
    try:
        with open_regular(file) as f:
            size = int.from_bytes(f.read(8), "little")
            length = f.seek(0, 2)
        if length < 8 + size:
            raise UserError(
                f"{file} is truncated ({length} bytes do not hold the header that it begins with); {REMEDY}"
            )
        if size > _MAX_HEADER:
            raise UserError(f"{file} has a header of {size} bytes, larger than any model's; {REMEDY}")
        with safe_open(file, "np") as opened:  # for torch it would map the tensors too
            return _entries(file, opened, 8 + size)
    except OSError as e:
        raise UserError(f"{file} cannot be read ({e.strerror}); {REMEDY}") from None
    except SafetensorError as e:
        reason = str(e).removeprefix("Error while deserializing header: ")[
            :200
        ]  # it repeats what the file says
        raise UserError(f"{file} is truncated, or no safetensors file ({reason}); {REMEDY}") from None


def _entries(file: Path, opened: safe_open, base: int) -> dict[str, tuple[Entry, int]]:
    found: dict[str, tuple[Entry, int]] = {}
    for name in opened.offset_keys():
        stated = opened.get_slice(name)
        dtype = stated.get_dtype()
        if dtype not in DTYPES:
            raise UserError(
                f"{file}: tensor {name!r} has dtype {dtype}, which torch has none for; give the directory with the "
                "BF16, FP16 or FP32 weights"
            )
        entry = Entry(tuple(stated.get_shape()), DTYPES[dtype])
        found[name] = (entry, base)
        base += prod(entry.shape) * entry.dtype.itemsize
    return found
