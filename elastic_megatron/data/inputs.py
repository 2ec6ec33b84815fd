"""Inputs of ``prepare-data``: which are JSON lines and which are text, and how they are read. No torch.

An input may be a pipe, as ``<(zcat FILE)`` gives, which can be read only once: what was looked at is kept.
"""

from __future__ import annotations

import io
import os
import re
import select
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from elastic_megatron.data.unpack import MAGIC_BYTES, packing_of, refuse_no_text, unpacked
from elastic_megatron.errors import UserError

Form = Literal["json lines", "text"]

BOM = b"\xef\xbb\xbf"
JSON_LINES_SUFFIXES = frozenset({".jsonl", ".ndjson", ".json"})
_HEAD = 64 << 10
_JSON = re.compile(rb'\s*[\[{]+\s*["}]')
WRITER_SECONDS = 10.0


@dataclass(frozen=True)
class Reading:
    """How inputs are to be taken.

    Args:
        json_key: given, every input is JSON lines with its text under this key.
        chat: every input is JSON lines with conversations.
        as_text: every input is text.
        skip_bad_lines: leave out JSON lines that cannot be used.
    """

    json_key: str | None = None
    chat: bool = False
    as_text: bool = False
    skip_bad_lines: bool = False

    @property
    def key(self) -> str:
        return self.json_key if self.json_key is not None else "text"

    @property
    def asks_json_lines(self) -> bool:
        return self.chat or self.json_key is not None

    def form(self, path: Path, head: bytes) -> Form:
        """What an input is: as it is said, else by its name, else by what most of its first lines are."""
        if self.as_text:
            return "text"
        json_lines = self.asks_json_lines or named_json_lines(path) or _looks_like_json_lines(head)
        return "json lines" if json_lines else "text"


@dataclass(frozen=True)
class Opened:
    """An input while it is read: its bytes, unpacked, and how many of its own bytes that took."""

    file: io.BufferedReader
    _raw: io.FileIO

    def consumed(self) -> int:
        """Bytes read from the disk so far; 0 of a pipe."""
        return self._raw.tell() if self._raw.seekable() else 0

    def facts(self) -> os.stat_result:
        return os.fstat(self._raw.fileno())

    def stamp(self) -> tuple[int, ...]:
        """What tells whether a file is another one than before."""
        facts = self.facts()
        return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns

    def close(self) -> None:
        self.file.close()
        self._raw.close()


@dataclass(frozen=True)
class Input:
    """An input that was looked into.

    Args:
        packing: what it is compressed with, if it is.
        size: bytes on the disk; ``None`` of a pipe.
    """

    path: Path
    form: Form
    packing: str | None
    size: int | None
    _pipe: Opened | None
    _stamp: tuple[int, ...]

    @contextmanager
    def reading(self) -> Iterator[Opened]:
        """Its bytes from the first. Raises ``UserError`` where it is damaged, or changes before the block ends."""
        opened = self._pipe or _open(self.path)[0]
        try:
            self._check(opened)
            yield opened
            self._check(opened)
        finally:
            opened.close()

    def _check(self, opened: Opened) -> None:
        if self.size is not None and opened.stamp() != self._stamp:
            raise UserError(
                f"{self.path} changed while it was read; wait until it is complete, and try again"
            )


def look_into(paths: Sequence[Path], reading: Reading) -> list[Input]:
    """What each input is, by its first bytes.

    Raises ``UserError`` where one is missing, cannot be read, or is recognised as something that is no text.
    """
    if not paths:
        raise UserError("no input files; give at least one text or .jsonl file")
    if reading.as_text and reading.asks_json_lines:
        raise UserError("--as-text and --json-key or --chat exclude each other; leave one out")
    found = [_look_into(path, reading) for path in paths]
    pipes = [each._stamp[:2] for each in found if each.size is None]
    if len(set(pipes)) < len(pipes):
        raise UserError("a pipe is given twice, but can be read only once; leave one out")
    return found


def named_json_lines(path: Path) -> bool:
    """Is it ``rows.jsonl``, ``rows.JSONL.gz`` or ``rows.ndjson.part-00``?"""
    return any(suffix.lower() in JSON_LINES_SUFFIXES for suffix in path.suffixes)


def refuse_nul(path: Path, data: bytes | bytearray) -> None:
    """Raise ``UserError`` for bytes that no text has."""
    if (at := data.find(b"\0")) >= 0:
        line = data.count(b"\n", 0, at) + 1
        raise UserError(f"{path}:{line}: holds a NUL byte, so it is no text; give text or JSON lines")


def _look_into(path: Path, reading: Reading) -> Input:
    opened, packing, head = _open(path)
    facts, stamp = opened.facts(), opened.stamp()
    pipe = not stat.S_ISREG(facts.st_mode)
    if not pipe:
        opened.close()
    form = reading.form(path, head)
    if form == "text":
        refuse_nul(path, head)
    return Input(path, form, packing, None if pipe else facts.st_size, opened if pipe else None, stamp)


def _open(path: Path) -> tuple[Opened, str | None, bytes]:
    """A file that is to be read from its first byte, its compression, and its first bytes unpacked."""
    raw = _open_raw(path)
    try:
        waited = _waited(path, raw.fileno())
        magic = waited + _first(raw, MAGIC_BYTES - len(waited))
        stream = io.BufferedReader(_Again(magic, raw))
        packing = packing_of(magic)
        if packing is not None:
            stream = io.BufferedReader(unpacked(path, packing, cast(BinaryIO, stream)), 1 << 20)
        head = _first(stream, _HEAD)
        refuse_no_text(path, head)
        if packing is not None and (inner := packing_of(head)):
            raise UserError(f"{path} holds a {inner} archive inside a {packing} one; unpack it once")
        return Opened(io.BufferedReader(_Again(head, stream), 1 << 20), raw), packing, head
    except BaseException:
        raw.close()
        raise


def _open_raw(path: Path) -> io.FileIO:
    try:
        # without O_NONBLOCK, a FIFO that nobody writes to never opens
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        remedy = "give a text file or a .jsonl file"
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path}: no such file; {remedy}") from None
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
        return io.FileIO(descriptor)
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a directory; name its files, for example {path}/*.jsonl")
    raise UserError(f"{path}: is a device or a socket; give a file or a pipe")


def _waited(path: Path, descriptor: int) -> bytes:
    """Wait until there is something in a pipe, or somebody who may write it; a byte of it may be returned."""
    waiting, first = select.poll(), b""
    waiting.register(descriptor, select.POLLIN)
    if not waiting.poll(WRITER_SECONDS * 1000):
        try:
            first = os.read(descriptor, 1)
        except BlockingIOError:
            pass  # there is a writer, who takes long
        else:
            if not first:
                raise UserError(f"{path}: is a pipe that nobody writes to; start its writer, or give a file")
    os.set_blocking(descriptor, True)
    return first


class _Again(io.RawIOBase):
    """A stream whose first bytes were read already."""

    def __init__(self, first: bytes, rest: Any) -> None:
        self._first, self._rest = memoryview(first), rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._first:
            return self._rest.readinto(buffer)
        count = min(len(buffer), len(self._first))
        buffer[:count], self._first = self._first[:count], self._first[count:]
        return count


def _first(stream: Any, count: int) -> bytes:
    """The first bytes of a stream, fewer only where it ends before."""
    parts: list[bytes] = []
    while count > 0 and (part := stream.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _looks_like_json_lines(head: bytes) -> bool:
    """Do at least half of the lines begin as JSON objects or lists do? The last one may be cut off."""
    lines = [line for line in head.removeprefix(BOM).split(b"\n") if line.strip()]
    return bool(lines) and 2 * sum(_JSON.match(line) is not None for line in lines) >= len(lines)
