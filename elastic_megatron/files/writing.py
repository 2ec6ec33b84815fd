"""The one atomic write: under a private name, on the disk, then renamed. A reader sees the old file or the new one."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .process import ended, mark

_SUFFIX = ".partial"
_DAY = 86400.0


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` once the block has ended without an exception.

    What killed writers of the same file left is removed. Raises ``OSError`` where the disk refuses; the old file stays.
    """
    remove_abandoned(path.parent, path.name)
    private = private_name(path)
    try:
        with open(private, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(private, path)
    except BaseException:
        with contextlib.suppress(OSError):
            private.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file by ``data``, atomically."""
    with replacing(path) as f:
        f.write(data)


def write_text(path: Path, text: str) -> None:
    """Replace a file by UTF-8 text, atomically."""
    write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def private_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` to fill and rename; it is gone afterwards, unless it was.

    For the one who holds the lock beside ``target``: what others left for the same target is removed.
    """
    for other in _private(target.parent, target.name):
        _remove(other)
    private = private_name(target)
    private.mkdir(parents=True)
    try:
        yield private
    finally:
        shutil.rmtree(private, ignore_errors=True)


def private_name(path: Path) -> Path:
    """A name beside ``path`` that no other process uses."""
    return path.with_name(f".{path.name}.{mark()}-{secrets.token_hex(4)}{_SUFFIX}")


def remove_abandoned(folder: Path, name: str = "*") -> None:
    """Remove what killed writers left in a folder for files of this name (a pattern).

    Of writers on other machines it is not known whether they live: what they leave goes when it is a day old.
    """
    for path in _private(folder, name):
        with contextlib.suppress(OSError):
            writer = path.name.removesuffix(_SUFFIX).rpartition(".")[2].rpartition("-")[0]
            if ended(writer) or time.time() - path.stat().st_mtime > _DAY:
                _remove(path)


def _private(folder: Path, name: str) -> list[Path]:
    pattern = name if name == "*" else glob.escape(name)
    return [p for p in folder.glob(f".{pattern}.*{_SUFFIX}") if name in ("*", _meant(p))]


def _meant(private: Path) -> str:
    """The name that a private one stands for."""
    return private.name.removesuffix(_SUFFIX).rpartition(".")[0].removeprefix(".")


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def sync_folder(folder: Path) -> None:
    """Have the disk keep the names in a folder; file systems that cannot are passed over."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
