"""What ``torch.save`` wrote into a stretch of a file: where the values of a tensor lie, or a whole object as data.

The file format is a zip archive of uncompressed records: a pickle that describes the object, the bytes of its storages,
the byte order. It is read more strictly than torch reads it, so that torch sees the same records wherever any are seen
here: each once, one after another, with nothing between or behind them, under names that ``torch.save`` uses.
"""

from __future__ import annotations

import io
import re
import struct
import sys
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .dist_metadata import reason
from .pickle_names import Names, RefusedError
from .raw import REMEDY, RawFiles, as_bytes
from .torch_objects import TENSORS, SavedStorage, SavedTensor, storage
from .unpickling import SIZE_LIMIT, load

# of an archive: its records before the values, and its directory
_END = 1 << 10
# bytes of a directory, for 10,000 records
_DIRECTORY = 1 << 20
_NAMES = re.compile(
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment|data/\d+|\.data/serialization_id"
)


def find_values(raw: RawFiles, file: Path, start: int, length: int, dtype: torch.dtype, numel: int) -> int:
    """The offset in a file of the first value of the tensor saved in ``length`` bytes from ``start``.

    Raises ``UserError`` where they are no archive of ``numel`` values of ``dtype``, one after another.
    """
    what = f"{file}: the tensor saved at byte {start}"
    stretch = Stretch(raw, file, start, length)
    try:
        return start + _find(Archive(stretch), dtype, numel)
    except zipfile.BadZipFile as e:
        stretch.seek(0)
        if stretch.read(9)[8:] == b"{":
            raise UserError(f"{what} is in safetensors format; save it in torch's own format") from None
        raise UserError(f"{what} is no torch archive ({reason(e)}); {REMEDY}") from None
    except RefusedError as e:
        raise UserError(f"{what} cannot be understood ({e} is no part of a tensor); {REMEDY}") from None
    except UserError:
        raise
    except Exception as e:  # damaged bytes raise all kinds
        raise UserError(f"{what} cannot be understood ({type(e).__name__}: {reason(e)}); {REMEDY}") from None


def _find(archive: Archive, dtype: torch.dtype, numel: int) -> int:
    saved = archive.load(TENSORS)
    if type(saved) is not SavedTensor:
        raise ValueError(f"it is a {type(saved).__name__}")
    if saved.dtype != dtype or prod(saved.shape) != numel:
        raise ValueError(f"it has {prod(saved.shape)} values of {saved.dtype} instead of {numel} of {dtype}")
    packed = [prod(saved.shape[i + 1 :]) for i in range(len(saved.shape))]
    if any(n > 1 and a != b for n, a, b in zip(saved.shape, saved.stride, packed, strict=True)):
        raise ValueError(f"its values lie apart, with strides {list(saved.stride)}")
    order = archive.content("byteorder").decode() if "byteorder" in archive.records else "little"
    if order != sys.byteorder:
        raise ValueError(f"its values are {order[:8]}-endian")
    return archive.positions[f"data/{saved.storage.record}"] + saved.offset * dtype.itemsize


class Archive:
    """The records of an archive by their names, and where the bytes of each begin.

    Its methods raise all kinds of exceptions (see ``reading``).
    """

    def __init__(self, file: Stretch) -> None:
        self._file = file
        with zipfile.ZipFile(file) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            end = archive.start_dir
        self.records = {info.filename.partition("/")[2]: info for info in infos}
        self.positions: dict[str, int] = {}
        if len(self.records) != len(infos):
            raise ValueError("it has one record twice")
        at, ends = 0, [*(info.header_offset for info in infos[1:]), end]
        for (name, info), after in zip(self.records.items(), ends, strict=True):
            if not _NAMES.fullmatch(name) or info.orig_filename != info.filename:
                raise ValueError("it has a record that no tensor has")
            self.positions[name] = start = self._position(info, at)
            at, described = after, after - start - info.file_size
            if described not in ((16, 24) if info.flag_bits & 8 else (0,)):
                raise ValueError(f"its record {name} is not where the directory says")

    def load(self, names: Names) -> Any:
        """The object, as data; tensors as ``SavedTensor``."""
        return load(self.content("data.pkl", SIZE_LIMIT), names, self._storage)

    def content(self, name: str, limit: int = 64) -> bytes:
        """Not by ``zipfile``, which wants a CRC: ``torch.save`` may write none, and ``torch.load`` looks at none."""
        start, count = self.positions[name], self.records[name].file_size
        if count > limit:
            raise ValueError(f"its record {name} has {count} bytes")
        return self._file.part(start, start + count)

    def _storage(self, pid: Any) -> SavedStorage:
        found = storage(pid)
        there = self.records[f"data/{found.record}"].file_size
        if found.nbytes > there:
            raise ValueError(f"its values have {there} bytes")
        return found

    def _position(self, info: zipfile.ZipInfo, at: int) -> int:
        """Where the bytes of a record begin, whose header is at ``at``."""
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.compress_size != info.file_size
            or info.flag_bits & 1
        ):
            raise ValueError("one of its records is compressed")
        self._file.seek(info.header_offset)
        magic, names = struct.unpack("<4s22x4s", self._file.read(30))
        if magic != b"PK\3\4" or info.header_offset != at:
            raise ValueError("one of its records is not where the directory says")
        return at + 30 + sum(struct.unpack("<HH", names))


class Stretch(io.RawIOBase):
    """A stretch of a file, as a file. The ends of an archive hold all but the values, and are read once."""

    def __init__(self, raw: RawFiles, file: Path, start: int, length: int) -> None:
        self._raw, self._file, self._start, self._length = raw, file, start, length
        self._position = 0
        starts = (0, max(0, length - _END))
        self._ends: list[tuple[int, bytes]] = []
        self._ends = [(start, self.part(start, start + _END)) for start in starts]

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
        if stop - start > _DIRECTORY:
            raise ValueError(f"its directory has {stop - start} bytes")
        return self.part(start, stop)

    def part(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop``, or to the end where that comes first."""
        stop = min(stop, self._length)
        for first, data in self._ends:
            if first <= start and stop <= first + len(data):
                return data[start - first : stop - first]
        out = torch.empty(stop - start, dtype=torch.uint8)
        self._raw.read(self._file, self._start + start, out)
        return as_bytes(out).tobytes()
