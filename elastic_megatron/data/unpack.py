"""Compressed files as streams, recognised by their first bytes; one that is damaged or cut short is named."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import io
import lzma
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from elastic_megatron.errors import UserError

MAGIC_BYTES = 16
# a window that takes more memory to unpack belongs to no file of texts
_WINDOW = 256 << 20
_CHUNK = 1 << 20

_NO_TEXT: dict[bytes, tuple[str, str]] = {
    b"PK\x03\x04": ("a zip archive", "unzip it"),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip archive", "unpack it"),
    b"Rar!": ("a RAR archive", "unpack it"),
    b"\x04\x22\x4d\x18": ("compressed with LZ4", "unpack it with lz4 -d, or pipe it: <(lz4 -dc FILE)"),
    b"\xff\x06\x00\x00sNaPpY": ("compressed with Snappy", "unpack it"),
    b"\x1f\x9d": ("compressed with compress", "unpack it with gzip -d"),
    b"LZIP": ("compressed with lzip", "unpack it with lzip -d, or pipe it: <(lzip -dc FILE)"),
    b"PAR1": ("a Parquet file", "write its rows as JSON lines"),
    b"ARROW1": ("an Arrow file", "write its rows as JSON lines"),
    b"Obj\x01": ("an Avro file", "write its rows as JSON lines"),
    b"\x89HDF\r\n\x1a\n": ("an HDF5 file", "write its texts as JSON lines"),
    b"MMIDIDX\x00\x00": ("a Megatron index, already tokenised", "give the texts"),
    b"%PDF-": ("a PDF file", "extract its text"),
    b"\xff\xfe": ("UTF-16 text", "convert it with iconv -f UTF-16 -t UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it with iconv -f UTF-16 -t UTF-8"),
}  # fmt: skip


def packing_of(magic: bytes) -> str | None:
    """What a file that begins with these bytes is compressed with; ``None`` where it is not."""
    return next((name for name, (first, _) in _PACKINGS.items() if magic.startswith(first)), None)


def refuse_no_text(path: Path, magic: bytes) -> None:
    """Raise ``UserError`` for what can be recognised as neither text nor a compression that is read here."""
    for first, (what, remedy) in _NO_TEXT.items():
        if magic.startswith(first):
            raise UserError(f"{path} is {what}, which is not read here; {remedy}")


def unpacked(path: Path, packing: str, packed: BinaryIO) -> io.RawIOBase:
    """A stream of the bytes in a compressed one; none of it is held in memory.

    Raises ``UserError`` that names ``path`` here where the compression cannot be read, and when it is read where it
    is damaged, cut short, or followed by something else.
    """
    return _Named(path, packing, _PACKINGS[packing][1](path, packed))


def zstd_is_there() -> bool:
    """Is the optional package installed? Nothing is imported."""
    return importlib.util.find_spec("zstandard") is not None


class _Named(io.RawIOBase):
    """Says which file is damaged."""

    def __init__(self, path: Path, packing: str, inner: Any) -> None:
        self._path, self._packing, self._inner = path, packing, inner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._inner.readinto(buffer)
        except (EOFError, zlib.error, lzma.LZMAError, OSError, *_zstd_errors()) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the archive's
                raise
            raise UserError(
                f"{self._path}: the {self._packing} archive is damaged or cut short ({error}); copy it again"
            ) from None


class _Streams(io.RawIOBase):
    """Compressed streams one after another, as bzip2 and xz concatenate them, and nothing behind them."""

    def __init__(self, packed: BinaryIO, start: Callable[[], Any]) -> None:
        self._packed, self._start = packed, start
        self._stream, self._left = start(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._stream.eof:
                self._left = self._stream.unused_data or self._packed.read(_CHUNK)
                if not self._left:
                    return 0
                self._stream = self._start()
            if self._stream.needs_input and not self._left:
                self._left = self._packed.read(_CHUNK)
                if not self._left:
                    raise EOFError("it ends before its end mark")
            data = self._stream.decompress(self._left, len(buffer))
            self._left = b""
            if data:
                buffer[: len(data)] = data
                return len(data)


def _gzip(_: Path, packed: BinaryIO) -> Any:
    return gzip.GzipFile(fileobj=packed, mode="rb")


def _bzip2(_: Path, packed: BinaryIO) -> Any:
    return _Streams(packed, bz2.BZ2Decompressor)


def _xz(_: Path, packed: BinaryIO) -> Any:
    return _Streams(packed, lambda: lzma.LZMADecompressor(memlimit=_WINDOW))


def _zstd(path: Path, packed: BinaryIO) -> Any:
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{path} is compressed with zstd, which needs the package zstandard: pip install zstandard, or pipe it: "
            f"<(zstdcat {path})"
        ) from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    return _Streams(packed, lambda: _ZstdFrame(decompressor.decompressobj()))


class _ZstdFrame:
    """A frame with the interface of ``bz2.BZ2Decompressor``: its own says nothing of a frame that was cut short."""

    # what 4 KiB may unpack to, 128 KiB for each 4 bytes, is held in memory
    _PIECE = 4096

    def __init__(self, frame: Any) -> None:
        self._frame, self._packed, self._unpacked = frame, b"", b""

    @property
    def eof(self) -> bool:
        return self._frame.eof and not self._unpacked

    @property
    def needs_input(self) -> bool:
        return not (self._packed or self._unpacked or self._frame.eof)

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data + self._packed

    def decompress(self, data: bytes, most: int) -> bytes:
        self._packed += data
        if not self._unpacked:
            piece, self._packed = self._packed[: self._PIECE], self._packed[self._PIECE :]
            self._unpacked = self._frame.decompress(piece)
        found, self._unpacked = self._unpacked[:most], self._unpacked[most:]
        return found


def _zstd_errors() -> tuple[type[Exception], ...]:
    module = sys.modules.get("zstandard")
    return () if module is None else (module.ZstdError,)


_PACKINGS: dict[str, tuple[bytes, Callable[[Path, BinaryIO], Any]]] = {
    "gzip": (b"\x1f\x8b", _gzip),
    "zstd": (b"\x28\xb5\x2f\xfd", _zstd),
    "xz": (b"\xfd7zXZ\x00", _xz),
    "bzip2": (b"BZh", _bzip2),
}
