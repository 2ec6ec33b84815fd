"""Opening files that somebody else wrote: regular ones only, of bounded size, and inside the folder that names them.

A FIFO would hang whoever opens it, a device would never end, and a link may lead anywhere.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError

TEXT_LIMIT = 16 << 20


def open_regular(path: Path) -> BinaryIO:
    """A file to read from.

    Raises ``OSError`` as ``open`` does, and ``UserError`` where the path is a FIFO, a socket or a device.
    """
    try:
        # without O_NONBLOCK, a FIFO that nobody writes to never opens
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as e:
        if _irregular(path):  # a socket has no way to be opened
            raise UserError(_not_regular(path)) from None
        raise e
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory", str(path))
        raise UserError(_not_regular(path))
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int = TEXT_LIMIT) -> bytes:
    """A whole file of at most ``limit`` bytes.

    Raises ``OSError`` as ``open`` does, and ``UserError`` where the file is larger or not regular.
    """
    with open_regular(path) as f:
        data = f.read(limit + 1)
    if len(data) > limit:
        raise UserError(
            f"{path} is larger than {limit >> 10} KiB, which no file of its kind is; give the right one"
        )
    return data


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """As ``read_bytes``, of UTF-8 text. Raises ``UnicodeDecodeError`` where it is none."""
    return read_bytes(path, limit).decode("utf-8")


def inside(folder: Path, name: object, said_by: Path) -> Path:
    """The file of a folder that another file names.

    It may lie below the folder, and below the cache of the Hugging Face hub that a snapshot belongs to, whose files
    are links into ``blobs/``. Whether it is there is not asked.

    Raises ``UserError`` where the name, or a link on the way, leads elsewhere.
    """
    legal = isinstance(name, str) and name and "\0" not in name and len(name) < 1024
    if not legal or Path(str(name)).is_absolute() or ".." in Path(str(name)).parts:
        raise UserError(
            f"{said_by} names {str(name)[:80]!r}, which is no file of its folder; correct it, or copy it again"
        )
    path = folder / str(name)
    if not contained(folder, path):
        raise UserError(
            f"{path} leads out of {folder}, to {os.path.realpath(path)}; put the file itself there"
        )
    return path


def contained(folder: Path, path: Path) -> bool:
    """Does a path, links followed, stay inside a folder or the hub's cache that the folder is a snapshot in?"""
    home = Path(os.path.realpath(folder))
    if home.parent.name == "snapshots" and (home.parents[1] / "blobs").is_dir():
        home = home.parents[1]
    return Path(os.path.realpath(path)).is_relative_to(home)


def _irregular(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _not_regular(path: Path) -> str:
    return f"{path} is a FIFO, a socket or a device; give an ordinary file"
