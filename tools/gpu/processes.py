"""Run a step in a process of its own, which may crash, hang or fail without the others noticing."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu.bench import Bench, Skipped, Step, share_of_limit

_LAST_LINES = 30


def context(rehearse: bool) -> Any:
    """How processes start: CUDA does not survive a fork, and without it a fork saves every process the imports."""
    return multiprocessing.get_context("fork" if rehearse else "spawn")


def run(step: Step, folder: Path, scratch: Path, *, rehearse: bool, limit: float) -> dict[str, Any]:
    """The outcome of a step: ``{name, title, outcome, seconds, limit, findings, rehearsed_with, reason, log}``.

    ``outcome`` is ``pass`` (``rehearsed`` in a rehearsal), ``skip`` or ``fail``; ``reason`` says why not, and ``log``
    is what a step that failed printed last.
    """
    files = {name: folder / f"{step.name}.{name}" for name in ("jsonl", "log")}
    for file in files.values():
        file.write_text("")
    began = time.monotonic()
    bench = Bench(files["jsonl"], scratch, rehearse)
    process = context(rehearse).Process(
        target=_child, args=(step, bench, files["log"], limit), name=step.name
    )
    process.start()
    try:
        process.join(limit)
        late = process.is_alive()
    finally:
        end(process)
    findings = [json.loads(line) for line in files["jsonl"].read_text().splitlines()]
    told = next((f for f in findings if "outcome" in f), None)
    outcome, reason = _judged(told, findings, late, limit, process.exitcode)
    return {
        "name": step.name,
        "title": step.title,
        "outcome": "rehearsed" if outcome == "pass" and rehearse else outcome,
        "seconds": round(time.monotonic() - began, 2),
        "limit": limit,
        "findings": [f for f in findings if "what" in f],
        "rehearsed_with": list(dict.fromkeys(f["with"] for f in findings if "with" in f)),
        "reason": reason,
        "log": files["log"].read_text(errors="replace").splitlines()[-_LAST_LINES:]
        if outcome == "fail"
        else [],
    }


def _judged(
    told: dict[str, Any] | None, findings: list[dict[str, Any]], late: bool, limit: float, code: int | None
) -> tuple[str, str]:
    """The outcome and why. A step that told nothing at its end did not get there."""
    if told is None:
        if late:
            return "fail", f"not done after {limit:.0f} s; killed"
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"status {code}"
        return "fail", f"its process ended with {how}"
    if told["outcome"] != "done":
        return told["outcome"], told["reason"]
    above = [f for f in findings if "limit" in f and share_of_limit(f) > 1]
    if above:
        return "fail", f"{len(above)} of its numbers above the limit, the first one {above[0]['what']}"
    return "pass", ""


def end(process: Any) -> None:
    """Kill a process and all that it started, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.is_alive():
        process.kill()  # one that has not yet made a group of its own
    process.join()


def apart(bench: Bench, function: Callable[..., object], *args: Any) -> Any:
    """Start ``function(*args)`` in a process of a step's own, which ends with the step; :func:`end` ends it before."""
    process = context(bench.rehearse).Process(target=_grandchild, args=(function, args))
    process.start()
    return process


def _child(step: Step, bench: Bench, log: Path, limit: float) -> None:
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = os.fdopen(descriptor, "w", buffering=1)
    faulthandler.enable(file=2)
    faulthandler.dump_traceback_later(0.9 * limit, file=2)  # where it hangs, before it is killed
    _die_with_parent()
    try:
        module, _, name = step.function.partition(":")
        getattr(importlib.import_module(module), name)(bench)
        told = {"outcome": "done"}
    except Skipped as why:
        told = {"outcome": "skip", "reason": str(why)}
    except BaseException as error:
        import traceback

        traceback.print_exc()
        last = (str(error).strip().splitlines() or [""])[-1]
        told = {"outcome": "fail", "reason": f"{type(error).__name__}: {last}".rstrip(": ")}
    bench._tell(told)
    sys.stdout.flush()
    sys.stderr.flush()
    # what a step leaves behind (threads of a library, a context of CUDA) must not keep it
    os._exit(0)


def _grandchild(function: Callable[..., object], args: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)
    _die_with_parent()
    function(*args)
    os._exit(0)


def _die_with_parent() -> None:
    from elastic_megatron.runtime import die_with_parent

    die_with_parent()
