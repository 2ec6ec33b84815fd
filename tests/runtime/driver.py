"""Run cases, each in a forked child of one process that has imported Megatron but adapted nothing.

``python driver.py [NAME ...]`` (all cases by default) prints one JSON object: case name to ``{"value": ...}`` or
``{"error": ...}``.  An import costs seconds and a fork milliseconds, so every case starts from a process that
nothing has touched.
"""

import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import psutil

CASE_SECONDS = 60


def main() -> None:
    import cases

    cases.import_megatron()
    public = [
        n for n, f in vars(cases).items() if getattr(f, "__module__", "") == "cases" and not n.startswith("_")
    ]
    names = sys.argv[1:] or [n for n in public if n != "import_megatron"]
    results = {name: run(getattr(cases, name)) for name in names}
    print(json.dumps(results))


def run(case: Callable[..., Any]) -> dict[str, Any]:
    """Run a case as ``case.ranks`` (else one) forked processes; the result is rank 0's, or the first error."""
    world = getattr(case, "ranks", 1)
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        children = [_fork(case, rank, world, port, folder) for rank in range(world)]
        for pid in children:
            os.waitpid(pid, 0)
        results = [_read(f"{folder}/{rank}.json") for rank in range(world)]
    errors = [r for r in results if "error" in r]
    return errors[0] if errors else results[0]


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _fork(case: Callable[..., Any], rank: int, world: int, port: int, folder: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(CASE_SECONDS)
    with open(os.devnull, "w") as quiet:
        os.dup2(quiet.fileno(), 1)
        os.dup2(quiet.fileno(), 2)
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )  # fmt: skip
    os.mkdir(f"{folder}/work{rank}")
    os.chdir(f"{folder}/work{rank}")
    try:
        result = {"value": case()}
    except BaseException as error:
        frames = [f.filename for f in traceback.extract_tb(error.__traceback__)]
        result = {"error": f"{type(error).__name__}: {error}", "file": frames[-1]}
    with open(f"{folder}/{rank}.json", "w") as f:
        json.dump(result, f)
    for left in psutil.Process().children(recursive=True):
        left.kill()  # _exit runs no clean-up, and a spawned manager would outlive it
    os._exit(0)


def _read(path: str) -> dict[str, Any]:
    if not os.path.exists(path):
        return {"error": "the case died or ran out of time"}
    with open(path) as f:
        return json.load(f)


if __name__ == "__main__":
    main()
