"""Run Megatron-LM scripts without a GPU: what ``megatron.training`` needs beyond the adaptations of Megatron-Core.

python megatron_training_on_cpu.py < runs.json

``runs.json`` is a list of ``{"script", "arguments", "ranks", "log"}``; the exit statuses of the ranks of each run are
printed as JSON. Ranks are forks of this process, which has imported everything: a run costs what it computes.

A test bed only: on a GPU nothing is patched, and the scripts know nothing of this file. Each stub says what it cures.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import signal
import sys
import traceback
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import TCPStore

SECONDS = 240  # for one run


def install() -> None:
    from elastic_megatron import runtime

    torch.set_flush_denormal(True)
    runtime.adapt()
    _cuda_has_one_device_without_state(torch.cuda)
    _groups_are_bound_to_no_device(torch.distributed)
    _pretrain_accepts_a_cpu()


def _cuda_has_one_device_without_state(cuda: Any) -> None:
    """With no device Megatron leaves model parallelism and seeds out; memory and generator states are asked for."""
    cuda.device_count = lambda: 1
    cuda.set_device = cuda.empty_cache = cuda.manual_seed = cuda.reset_peak_memory_stats = lambda *_: None
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *_: 0)
    cuda.memory_stats = lambda *_: {}
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_properties = lambda *_: SimpleNamespace(
        major=9, minor=0, name="cpu", total_memory=1, multi_processor_count=1
    )
    cuda.get_rng_state = lambda *_: torch.empty(0, dtype=torch.uint8)
    cuda.set_rng_state = lambda *_: None


def _groups_are_bound_to_no_device(distributed: Any) -> None:
    """gloo takes neither ``device_id`` nor ``device_ids``."""
    start, barrier = distributed.init_process_group, distributed.barrier

    def init_process_group(*args: Any, device_id: Any = None, **kwargs: Any) -> None:
        start(*args, **kwargs)

    distributed.init_process_group = init_process_group
    distributed.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)


def _pretrain_accepts_a_cpu() -> None:
    """``Megatron requires CUDA``; and ``make`` for helpers that the wheel ships built, without a Makefile."""
    import megatron.core.datasets.utils as datasets
    from megatron.training import training

    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)
    datasets.compile_helpers = lambda: None


def run(script: str, arguments: list[str], ranks: int, log: str) -> list[int]:
    """Exit statuses of the ranks; one that fails or takes too long ends the others."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rendezvous = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": str(ranks),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    children = [
        _fork(script, arguments, f"{log}.{rank}", rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(ranks)
    ]
    statuses: dict[int, int] = {}
    signal.signal(signal.SIGALRM, lambda *_: _kill(children, statuses))
    signal.alarm(SECONDS)
    while len(statuses) < ranks:
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        if status:
            signal.alarm(1)  # time enough to say what happened
    signal.alarm(0)
    return [statuses[child] for child in children]


def _fork(script: str, arguments: list[str], log: str, environment: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _kill(children: list[int], ended: dict[int, int]) -> None:
    for child in children:
        if child not in ended:
            os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    runs = json.load(sys.stdin)
    install()
    import elastic_megatron.integrations.megatron_lm  # noqa: F401  what the runs share

    print(json.dumps([run(**r) for r in runs]))
