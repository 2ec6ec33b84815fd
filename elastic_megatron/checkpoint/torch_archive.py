"""Where the values of a tensor saved by ``torch.save`` lie in a file, so that a part of them can be read.

The file format is a zip archive of uncompressed records: a pickle that describes the tensor, the bytes of its storage,
the byte order. ``torch.load(map_location="meta")`` tells the same in twice the time.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from .raw import REMEDY, RawFiles, as_bytes

_STORAGES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16}
# of an archive: its records before the values, and its directory
_END = 1 << 10


def find_values(raw: RawFiles, file: Path, start: int, length: int, dtype: torch.dtype, numel: int) -> int:
    """The offset in a file of the first value of the tensor saved in ``length`` bytes from ``start``.

    Raises ``UserError`` where they are no archive of ``numel`` values of ``dtype``, one after another.
    """
    what = f"{file}: the tensor saved at byte {start}"
    archive = _Slice(raw, file, start, length)
    try:
        return start + _find(archive, dtype, numel)
    except zipfile.BadZipFile as e:
        archive.seek(0)
        if archive.read(9)[8:] == b"{":
            raise UserError(f"{what} is in safetensors format; save it in torch's own format") from None
        raise UserError(f"{what} is no torch archive ({e}); {REMEDY}") from None
    except UserError:
        raise
    except Exception as e:  # damaged bytes raise all kinds
        raise UserError(f"{what} cannot be understood ({type(e).__name__}: {e}); {REMEDY}") from None


def _find(file: _Slice, dtype: torch.dtype, numel: int) -> int:
    with zipfile.ZipFile(file) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    order = _content(file, records["byteorder"]).decode() if "byteorder" in records else "little"
    saved = _Unpickler(io.BytesIO(_content(file, records["data.pkl"]))).load()
    record = records[f"data/{saved.record}"]
    if saved.dtype != dtype or prod(saved.shape) != numel:
        raise ValueError(f"it has {prod(saved.shape)} values of {saved.dtype} instead of {numel} of {dtype}")
    packed = [prod(saved.shape[i + 1 :]) for i in range(len(saved.shape))]
    if any(n > 1 and a != b for n, a, b in zip(saved.shape, saved.stride, packed, strict=True)):
        raise ValueError(f"its values lie apart, with strides {list(saved.stride)}")
    if order != sys.byteorder:
        raise ValueError(f"its values are {order}-endian")
    begin = saved.offset * dtype.itemsize
    if record.file_size < begin + numel * dtype.itemsize:
        raise ValueError(f"its values have {record.file_size} bytes")
    return _position(file, record) + begin


def _content(file: _Slice, record: zipfile.ZipInfo) -> bytes:
    """Not by ``zipfile``, which wants a CRC: ``torch.save`` may write none, and ``torch.load`` looks at none."""
    file.seek(_position(file, record))
    return file.read(record.file_size)


def _position(file: _Slice, record: zipfile.ZipInfo) -> int:
    """Where the bytes of a record begin."""
    if record.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"its record {record.filename} is compressed")
    file.seek(record.header_offset)
    magic, names = struct.unpack("<4s22x4s", file.read(30))
    start = record.header_offset + 30 + sum(struct.unpack("<HH", names))
    file.seek(start + record.file_size)
    after = b"PK\7\10" if record.flag_bits & 8 else b"PK"  # the sizes again, or what comes next
    if magic != b"PK\3\4" or not file.read(4).startswith(after):
        raise ValueError(f"its record {record.filename} is not where the directory says")
    return start


class _Slice(io.RawIOBase):
    """A stretch of a file, as a file. The ends of an archive hold all but the values, and are read once."""

    def __init__(self, raw: RawFiles, file: Path, start: int, length: int) -> None:
        self._raw, self._file, self._start, self._length = raw, file, start, length
        self._position = 0
        starts = (0, max(0, length - _END))
        self._ends = [(start, self._bytes(start, min(start + _END, length))) for start in starts]

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if (position := offset + (0, self._position, self._length)[whence]) < 0:
            raise OSError("seek before the beginning")
        self._position = position
        return position

    def read(self, size: int = -1, /) -> bytes:
        start, length = self._position, self._length
        self._position = stop = max(start, length if size < 0 else min(start + size, length))
        for first, data in self._ends:
            if first <= start and stop <= first + len(data):
                return data[start - first : stop - first]
        return self._bytes(start, stop)

    def _bytes(self, start: int, stop: int) -> bytes:
        out = torch.empty(stop - start, dtype=torch.uint8)
        self._raw.read(self._file, self._start + start, out)
        return as_bytes(out).tobytes()


class _Saved(NamedTuple):
    """A pickled tensor: the record of its storage, and how it lies there."""

    dtype: torch.dtype
    record: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Understands pickled tensors and nothing else, and builds none."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, *place: _Saved(*storage, *place[:3])
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a tensor")

    def persistent_load(self, pid: Any, /) -> tuple[torch.dtype, str]:
        _, dtype, record, *_ = pid
        return dtype, record
