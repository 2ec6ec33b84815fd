"""Time one conversion in a process of its own; what it took is one line of JSON on stdout.

python tools/benchmarks/measure.py OPERATION SOURCE DESTINATION SCRATCH
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_megatron.checkpoint.source import open_stored
from elastic_megatron.conversion import Request, to_hf, to_megatron

sys.path.insert(0, str(Path(__file__).resolve().parent))

import synthetic


@dataclass(frozen=True)
class Operation:
    """A conversion that is measured.

    Args:
        title: for the table.
        source: ``hf`` or ``megatron``.
        run: of (source, destination).
        target: the least rate, in rates of ``cp``; ``None`` where it is measured as information.
        quick: also part of the sweep over input sizes.
    """

    title: str
    source: str
    run: Callable[[Path, Path], object]
    target: float | None
    quick: bool = True


def _import(verify: bool) -> Callable[[Path, Path], object]:
    return lambda source, destination: to_megatron(open_stored(source), destination, verify=verify)


def _export(verify: bool) -> Callable[[Path, Path], object]:
    def run(source: Path, destination: Path) -> object:
        return to_hf(open_stored(source), [Request(destination / "elastic", elastic=True)], verify=verify)

    return run


def _slice(*names: str) -> Callable[[Path, Path], object]:
    def run(source: Path, destination: Path) -> object:
        return to_hf(open_stored(source), [Request(destination / name, submodel=name) for name in names])

    return run


OPERATIONS = {
    "import": Operation("import", "hf", _import(verify=False), 0.5),
    "export": Operation("export, elastic", "megatron", _export(verify=False), 0.5),
    "slice": Operation("slice 12b", "hf", _slice("12b"), 0.7),
    "slice_two": Operation("slice 23b and 12b", "hf", _slice("23b", "12b"), 0.7),
    "export_submodel": Operation("export 12b", "megatron", _slice("12b"), 0.5),
    "import_verify": Operation("import --verify", "hf", _import(verify=True), None, quick=False),
    "export_verify": Operation(
        "export, elastic, --verify", "megatron", _export(verify=True), None, quick=False
    ),
}


def flush(directory: Path) -> None:
    """Wait until every file of a directory is on the disk."""
    for path in [directory, *directory.rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def size_of(directory: Path) -> int:
    """Bytes of its files."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _rehearse(operation: Operation, scratch: Path) -> None:
    """The same operation on a tiny model, so that everything it imports is imported."""
    synthetic.write(scratch / "hf", synthetic.tiny())
    if operation.source == "megatron":
        to_megatron(open_stored(scratch / "hf"), scratch / "megatron")
    operation.run(scratch / operation.source, scratch / "out")
    gc.collect()


def _status(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _idle() -> int:
    """Memory of the process before the operation, from which the highest since then is counted."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    return _status("VmHWM")


def _bytes_read() -> int:
    """What this process has read so far, by system calls, from files and caches alike."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar:"))


def _largest_child() -> int:
    """The highest memory of a child process so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def _measure(operation: Operation, source: Path, destination: Path) -> dict[str, Any]:
    """Seconds until everything is on the disk, bytes, CPU seconds, and the highest memory above idle.

    Bytes read count once, however often they are read.
    """
    whole = size_of(source)
    idle, read, children = _idle(), _bytes_read(), _largest_child()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    operation.run(source, destination)
    flush(destination)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    # a process that the operation started and that outgrew those of the imports
    child = largest if (largest := _largest_child()) > children else 0
    return {
        "seconds": seconds,
        "read": min(whole, _bytes_read() - read),
        "written": size_of(destination),
        "peak_rss": _status("VmHWM") - idle + child,
        "idle_rss": idle,
        "user_seconds": after.ru_utime - before.ru_utime,
        "system_seconds": after.ru_stime - before.ru_stime,
        "page_faults": after.ru_minflt - before.ru_minflt,
    }


def main() -> int:
    name, source, destination, scratch = sys.argv[1], *map(Path, sys.argv[2:])
    operation = OPERATIONS[name]
    _rehearse(operation, scratch)
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(_measure(operation, source, destination)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
