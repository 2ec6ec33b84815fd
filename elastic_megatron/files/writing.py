"""The one atomic write: under a private name, on the disk, then renamed. A reader sees the old file or the new one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_SUFFIX = ".partial"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of ``path`` once the block has ended without an exception.

    Raises ``OSError`` where the disk refuses; the old file stays.
    """
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


def private_name(path: Path) -> Path:
    """A name beside ``path`` that no other process uses."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}")


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writers left in a folder. For the one who holds its lock."""
    for left in folder.glob(f".*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            left.unlink()


def sync_folder(folder: Path) -> None:
    """Have the disk keep the names in a folder; file systems that cannot are passed over."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
