"""The far side of :mod:`pool`: one process imports torch and Megatron, and the ranks are forks of it.

``python worker.py CONTROL LOGS IMPORT`` answers requests on the socket with descriptor ``CONTROL``: ``fork``, with a
pipe for each rank, and ``reap``. When the other end of the socket is closed, it ends and takes ranks and logs along.
An import costs ten seconds and a fork milliseconds, so ranks that died or hung are cheap to replace.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import sys
import traceback
from multiprocessing.connection import Connection

MOST_RANKS = 64


def main(control: socket.socket, logs: str, import_first: bool) -> None:
    if import_first:
        import_megatron()
        gc.freeze()  # Megatron collects garbage whenever it lists the state of an optimizer
    ranks: list[int] = []
    try:
        while True:
            request, pipes, _, _ = socket.recv_fds(control, 16, MOST_RANKS)
            if request == b"fork":
                ranks = [_fork(rank, pipes, control, logs) for rank in range(len(pipes))]
                for pipe in pipes:
                    os.close(pipe)
                control.send(json.dumps(ranks).encode())
            elif request == b"reap":
                codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
                ranks = []
                control.send(json.dumps(codes).encode())
            else:
                return
    finally:
        for pid in ranks:
            os.killpg(pid, signal.SIGKILL)
        shutil.rmtree(logs, ignore_errors=True)


def import_megatron() -> None:
    """What training and ranking processes import, and what test modules do, since ranks import those."""
    import megatron.core.dist_checkpointing.strategies.filesystem_async
    import megatron.core.distributed
    import megatron.core.models.hybrid.hybrid_model
    import megatron.core.optimizer
    import megatron.core.pipeline_parallel  # noqa: F401
    import modelopt.torch.quantization  # noqa: F401
    import pytest  # noqa: F401

    import elastic_megatron.runtime.leaves
    import elastic_megatron.training.rank  # noqa: F401


def _fork(rank: int, pipes: list[int], control: socket.socket, logs: str) -> int:
    """A rank at its end of ``pipes[rank]``, leader of a process group of its own; returns its process number."""
    importer = os.getpid()
    if pid := os.fork():
        os.setpgid(pid, pid)  # here, so that whoever hears of the rank can already kill its group
        return pid
    try:
        control.close()
        for other in set(pipes) - {pipes[rank]}:
            os.close(other)
        log = os.open(f"{logs}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.enable(all_threads=True)  # the pool ends a rank that hangs by SIGABRT
        serve(Connection(pipes[rank]), importer)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def serve(pipe: Connection, importer: int) -> None:
    """Answer jobs until the pipe is closed. A job is followed by an empty message once all its ranks are done."""
    PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != importer:
        return
    while True:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            os._exit(0)
        os.ftruncate(1, 0)
        pipe.send_bytes(_answer(job))
        pipe.recv_bytes()
        if runtime := sys.modules.get("elastic_megatron.runtime"):
            runtime.stop()
        pipe.send_bytes(b"")


def _answer(job: bytes) -> bytes:
    """Pickle of ``(value, None)``, or of ``(None, (error in one line, traceback))``."""
    try:
        environment, sys.path[:], folder, call = pickle.loads(job)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        function, args, kwargs = pickle.loads(call)
        answer = pickle.dumps((function(*args, **kwargs), None))
    except BaseException as error:
        said = "".join(traceback.format_exception_only(error)).strip()
        answer = pickle.dumps((None, (said, traceback.format_exc())))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return answer


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2], sys.argv[3] == "True")
