"""Time several programs side by side in one process, and the device they run on.

Every round runs each contender once, in an order that rotates from round to round, and ratios are taken within a
round: what slows the machine for a while slows both sides of a ratio. Before the first round each contender runs
once untimed.

On a CPU the clock counts CPU seconds of this process, which runs one thread: on an idle machine they are the seconds
of a wall clock, and other programs do not add to them. On an accelerator the clock is the wall, and it waits for the
device.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from elastic_megatron import runtime
from elastic_megatron.errors import UserError

Step = Callable[[], object]
Times = Mapping[str, Sequence[float]]


def start(seed: int = 1234) -> torch.device:
    """Megatron on this process' device. Raises ``UserError`` on a CPU with more than one thread."""
    device = runtime.start(seed=seed).device
    if device.type == "cpu" and torch.get_num_threads() != 1:
        raise UserError(f"{torch.get_num_threads()} threads: benchmarks run one; set OMP_NUM_THREADS=1")
    return device


def dtype_of(device: torch.device) -> torch.dtype:
    """What models compute in there: fp32 on a CPU, else bf16."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def describe(device: torch.device) -> dict[str, Any]:
    """The device, the precision and the clock, for the results."""
    cpu = device.type == "cpu"
    return {
        "device": "one CPU thread" if cpu else torch.cuda.get_device_name(device),
        "dtype": str(dtype_of(device)).removeprefix("torch."),
        "clock": "CPU seconds" if cpu else "wall seconds",
    }


def seconds() -> float:
    """The clock, when everything asked of the device is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time()


def race(
    contenders: Mapping[str, Step], rounds: int, say: Callable[[str], None] = lambda _: None
) -> dict[str, list[float]]:
    """Seconds of every contender in every round."""
    if rounds < 1:
        raise UserError(f"{rounds} rounds: give at least 1")
    names = list(contenders)
    for name in names:
        contenders[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        turn = r % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            began = seconds()
            contenders[name]()
            times[name].append(seconds() - began)
        say(f"round {r + 1}/{rounds}: " + ", ".join(f"{n} {times[n][-1]:.2f} s" for n in names))
    return times


def ratio(times: Times, over: Sequence[str], under: Sequence[str]) -> dict[str, float]:
    """Median, least and most over the rounds of mean seconds of ``over`` by mean seconds of ``under``."""
    sums = [
        [sum(row) / len(names) for row in zip(*(times[n] for n in names), strict=True)]
        for names in (over, under)
    ]
    return spread([a / b for a, b in zip(*sums, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Peak:
    """The most memory since this was made above what was in use then, in bytes.

    On a CPU it is resident memory, exact in a process that :func:`peak_of` has started. On an accelerator, allocated
    memory.
    """

    def __init__(self) -> None:
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.reset_peak_memory_stats()
            self._before = torch.accelerator.memory_allocated()
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")

    def bytes(self) -> int:
        if torch.accelerator.is_available():
            return torch.accelerator.max_memory_allocated() - self._before
        return _status("VmHWM") - self._before


def peak_of(script: Path, arguments: Sequence[str]) -> int:
    """What ``script --peak ARGUMENTS`` prints last, the bytes of a :class:`Peak` in a process of its own.

    Raises ``UserError`` with the reason where it fails.
    """
    what = " ".join(arguments)
    # each block that is freed goes back to the system, as glibc maps it by itself
    exact = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_MMAP_MAX_": "1000000",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, str(script), "--peak", *arguments]
    try:
        done = subprocess.run(
            command, env={**os.environ, **exact}, capture_output=True, text=True, timeout=600, check=False
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the memory of {what!r} was not measured within 600 s; use an idle machine"
        ) from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise UserError(f"the memory of {what!r} was not measured: {reason}")
    found = int(done.stdout.splitlines()[-1])
    print(f"{what}: peak memory {found / 1e6:,.0f} MB", file=sys.stderr, flush=True)
    return found


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
