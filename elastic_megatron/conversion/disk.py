"""Room on disks, and what to say where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.checkpoint import CheckpointException

from ..errors import RetryableError, UserError, failure_in, of_os_error

# beside the weights: headers, config, tokenizer, and what file systems need for themselves
_RESERVE = 64 << 20


def check_space(wanted: Mapping[Path, int]) -> None:
    """Raise ``RetryableError`` unless the disks have room for these bytes at these paths, which need not exist yet."""
    sizes: dict[int, int] = {}
    places: dict[int, Path] = {}
    for path, size in wanted.items():
        place = path.absolute()
        while not place.exists():
            place = place.parent
        device = place.stat().st_dev
        sizes[device] = sizes.get(device, _RESERVE) + size
        places[device] = place
    for device, size in sizes.items():
        free = shutil.disk_usage(places[device]).free
        if free < size:
            raise RetryableError(
                f"{places[device]} has {_gib(free)} GiB free, the conversion writes {_gib(size)} GiB; free space, or "
                "choose a destination on another disk"
            )


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Say in one line what kept files from being written to ``folder``, as ``UserError`` or ``RetryableError``."""
    try:
        yield
    except (OSError, CheckpointException) as e:
        inner = failure_in(e)
        what = f"{folder} cannot be written"
        told = of_os_error(inner, what) if isinstance(inner, OSError) else None
        raise told or UserError(f"{what} ({inner}); choose another destination") from e


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
