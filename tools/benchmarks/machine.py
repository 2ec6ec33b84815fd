"""What the machine is, and how it is brought into the same state before everything that is timed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import flush

_PACKAGES = {"torch": "torch", "megatron-core": "megatron-core", "safetensors": "safetensors"}
# what Linux wants to keep free, and the most that is filled
_RESERVE, _MOST = 400_000_000, 64_000_000_000


def facts(directory: Path) -> dict[str, Any]:
    """The machine and the file system of a directory."""
    return {
        "cpu": _cpuinfo("model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory("MemTotal"),
        "virtual": "hypervisor" in _cpuinfo("flags").split(),
        "filesystem": _filesystem(directory),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: version(package) for name, package in _PACKAGES.items()
    }


def memory(field: str) -> int:
    """A line of ``/proc/meminfo``, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def copy(source: Path, destination: Path) -> tuple[float, float]:
    """Seconds that ``cp`` takes, until everything is on the disk, and its CPU seconds."""
    start, before = time.perf_counter(), os.times()
    subprocess.run(["cp", "--reflink=never", "-r", source, destination], check=True)
    flush(destination)
    # the last of these times is no CPU time
    cpu = sum(os.times()[:4]) - sum(before[:4])
    return time.perf_counter() - start, cpu


class Steady:
    """Page cache and free memory in the same state before every timing.

    The source is in the page cache (or, ``cold``, not). Nothing waits to be written. On a virtual machine all free
    memory holds clean pages of sparse files, which cost no disk: such a machine gives memory that is free for a
    second back to its host, and getting it again takes several times as long as copying a file into it.

    Args:
        directory: for the sparse files.
        cold: drop the source from the page cache.
    """

    def __init__(self, directory: Path, *, cold: bool = False) -> None:
        self.directory, self.cold = directory, cold
        self._fill = "hypervisor" in _cpuinfo("flags").split()
        self._number = 0
        directory.mkdir()

    def prepare(self, source: Path) -> None:
        os.sync()
        for file in sorted(source.rglob("*")):
            if file.is_file():
                _forget(file) if self.cold else _read(file)
        free = min(_MOST, memory("MemFree") - _RESERVE)
        if self._fill and free > 0:
            self._number += 1
            sparse = self.directory / str(self._number)
            sparse.touch()
            os.truncate(sparse, free)
            _read(sparse)


def check_space(directory: Path, wanted: int) -> str | None:
    """What is wrong with the free space there; ``None`` where there is enough."""
    free = shutil.disk_usage(directory).free
    if free >= wanted:
        return None
    return (
        f"{directory} has {free / 1e9:.0f} GB free and {wanted / 1e9:.0f} GB are needed; give another --dir"
    )


def _read(file: Path) -> None:
    buffer = bytearray(1 << 22)
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def _forget(file: Path) -> None:
    with open(file, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _cpuinfo(field: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return "unknown"


def _filesystem(directory: Path) -> str:
    """The type of the mount that holds a directory: the longest mount point above it, the last one mounted."""
    best, found = -1, "unknown"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if directory.resolve().is_relative_to(point) and len(point) >= best:
            best, found = len(point), kind
    return found
