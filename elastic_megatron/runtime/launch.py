"""Run a command on several ranks of this machine: what torchrun does, without its chatter."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import subprocess
import time
from collections.abc import Sequence

from torch.distributed import TCPStore


def run_ranks(command: Sequence[str], ranks: int, *, grace_seconds: float = 60.0) -> int:
    """Run ``command`` on ``ranks`` single-threaded processes; returns the first status that is not 0, else 0.

    This process hosts the rendezvous store on a port the system picks, so two runs cannot collide; the
    environment is torchrun's. If a rank fails the others are terminated. If this process is interrupted the
    ranks get the same signal and ``grace_seconds`` to save, and the interruption goes on.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = [
        subprocess.Popen(command, env=os.environ | torchrun_environment(rank, ranks, store.port))
        for rank in range(ranks)
    ]
    try:
        while (status := _status(children)) is None:
            time.sleep(0.1)
    except BaseException:
        _stop(children, signal.SIGTERM, grace_seconds)
        raise
    _stop(children, signal.SIGTERM, grace_seconds)
    return status


def torchrun_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets for one rank, whose rendezvous store listens on ``port`` of this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1",
    }


def _status(children: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """A failed rank's status; 0 when all are done; ``None`` while they run."""
    codes = [child.poll() for child in children]
    failed = [code for code in codes if code]
    return failed[0] if failed else None if None in codes else 0


def _stop(children: Sequence[subprocess.Popen[bytes]], number: signal.Signals, grace: float) -> None:
    """Leave no rank behind."""
    for child in children:
        if child.poll() is None:
            child.send_signal(number)
    deadline = time.monotonic() + grace
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def die_with_parent() -> None:
    """A forked server holds its parent's sockets; were it to outlive a killed rank, the others would wait for it."""
    PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def begin_fork() -> None:
    """What a fork of a rank does first: it dies with the rank, and never collects what it inherited.

    Garbage of the rank may hold process groups. gloo's wait for their threads when they are destroyed, and a fork has
    none of these: it would hang or crash whenever Python happens to collect.
    """
    die_with_parent()
    gc.freeze()
