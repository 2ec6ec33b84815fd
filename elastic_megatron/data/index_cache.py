"""Index files of data sets, which jobs share: one builds them, the others wait; what a killed job left is built again.

Megatron writes them in place, so that a file may be cut short, and takes every file that is there for whole.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np
import torch

from elastic_megatron.errors import UserError
from elastic_megatron.files import lock
from elastic_megatron.files.reading import open_regular

# below the time that ranks wait for each other
PATIENCE_SECONDS = 500.0
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@contextlib.contextmanager
def building(folder: Path) -> Iterator[None]:
    """While a data set's indices are built or read; under torch.distributed collective, and rank 0 holds the lock.

    A folder that cannot be written to is read as it is.

    Raises ``UserError`` on all ranks where another job builds for too long, or a damaged file cannot be removed.
    """
    held, problem = None, None
    together = torch.distributed.is_initialized()
    if not together or torch.distributed.get_rank() == 0:
        try:
            held = _held(folder)
            _remove_damaged(folder)
        except UserError as e:
            problem = str(e)
        except OSError as e:
            problem = f"{e.filename} is damaged and cannot be removed ({e.strerror}); name another data.cache"
    if together:
        told = [problem]
        torch.distributed.broadcast_object_list(told)
        problem = told[0]
    with held or contextlib.nullcontext():
        if problem is not None:
            raise UserError(problem)
        yield


def _held(folder: Path) -> lock.Held | None:
    try:
        return lock.acquire(lock.within(folder), "building indices of data", PATIENCE_SECONDS)
    except OSError:
        return None


def _remove_damaged(folder: Path) -> None:
    """With all files of the same data set: Megatron would write over those, which other jobs have mapped."""
    for file in sorted([*folder.glob("*.npy"), *folder.glob("*description.txt")]):
        if file.exists() and not _whole(file):
            print(
                f"{file} was left half-written or is damaged; its data set's indices are built again",
                file=sys.stderr,
            )
            (folder / file.name).unlink()
            for other in folder.glob(f"{file.name.rpartition('-')[0]}-*"):
                other.unlink()


def _whole(file: Path) -> bool:
    """Has a file the numbers that its header promises, and nothing that needs unpickling? Is a description a file?"""
    try:
        with open_regular(file) as f:
            if file.suffix != ".npy":
                return True
            shape, _, dtype = _HEADERS[np.lib.format.read_magic(f)](f)
            size = os.fstat(f.fileno()).st_size
            return not dtype.hasobject and f.tell() + prod(shape) * dtype.itemsize == size
    except (ValueError, LookupError, TypeError):
        return False
