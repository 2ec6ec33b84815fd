"""Bytes of files, from and to tensors.

Mapped files would be shorter, but their pages count as memory of the process: a conversion of 60 GB would look, and
under a memory limit behave, as if it held 60 GB.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError

_OPEN_FILES = 64
_WORTH_WRITING = 1 << 20


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def begin_writing(descriptor: int, start: int, size: int) -> None:
    """Have the disk take a stretch that was written to a file now, while more is computed, instead of at the end.

    Linux begins to write pages that it is told will not be needed, and waits for nothing.
    """
    if size >= _WORTH_WRITING:
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


class OpenFiles:
    """Any number of files by name, a bounded number of them open; for several threads at once."""

    def __init__(self, flags: int) -> None:
        self._flags = flags | os.O_CLOEXEC
        self._open: OrderedDict[Path, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> OpenFile:
        with self._lock:
            if path not in self._open:
                self._open[path] = OpenFile(path, self._flags)
            self._open.move_to_end(path)
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return self._open[path]

    def forget(self, path: Path) -> None:
        """The file will not be needed again."""
        with self._lock:
            self._open.pop(path, None)


class OpenFile:
    """A file descriptor, closed once the last thread lets go of this object."""

    def __init__(self, path: Path, flags: int) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, flags)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class RawFiles:
    """Reads from any number of files, for several threads at once."""

    def __init__(self) -> None:
        self._files = OpenFiles(os.O_RDONLY | os.O_NONBLOCK)  # a FIFO is then an error, and no wait

    def read(self, file: Path, offset: int, out: Tensor) -> None:
        """Fill ``out``, contiguous and on the CPU, with the bytes from ``offset``.

        Raises ``UserError`` that names the file where it cannot be read or ends before.
        """
        buffer = as_bytes(out)
        try:
            opened = self._files.get(file)
            while buffer:
                n = os.preadv(opened.descriptor, [buffer], offset)
                if n == 0:
                    raise UserError(f"{file} ends before byte {offset + len(buffer)}; {REMEDY}")
                buffer, offset = buffer[n:], offset + n
        except OSError as e:
            raise UserError(f"{file} cannot be read ({e.strerror}); {REMEDY}") from None


REMEDY = "copy it again, or restore it from a backup"
