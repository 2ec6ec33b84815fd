"""The daemons of a private Slurm cluster, owned by one process: ``python slurm_daemons.py FOLDER NODE...``.

The owner is a child subreaper (prctl(2)): whatever the daemons start stays among its descendants, although
slurmstepd leaves its parent by a double fork. It obeys lines on its standard input ("start NODE",
"kill NODE"), answers each with "ok", and when the input closes it ends every descendant and removes the
folder. So a test session that was killed leaves nothing behind, whichever way it died.

FOLDER holds ``slurm.conf`` (written by `local_slurm`), the munge key and socket, logs, state and, per node,
the spool folder, which is also the working folder of the node's slurmd and so of its slurmstepd.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
DAEMONS = ("munged", "slurmctld", "slurmd")


def which_daemon(name: str) -> str | None:
    """The path of a daemon; users who are not root rarely have ``sbin`` on their PATH."""
    return shutil.which(name, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


class Daemons:
    """munged, slurmctld and one slurmd per node, all in the foreground, each with a log of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _start(self, name: str, *command: str, cwd: Path) -> None:
        program = which_daemon(command[0])
        assert program, f"{command[0]} is not installed"
        environment = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": os.environ["PATH"]}
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            subprocess.Popen(
                [program, *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=cwd,
                env=environment,
                start_new_session=True,
            )

    def start_controller(self) -> None:
        """munged first: slurmctld signs its first message when it starts."""
        folder = self.folder
        socket = folder / "munge.socket"
        options = [f"--key-file={folder}/munge.key", f"--socket={socket}", f"--seed-file={folder}/munge.seed"]
        options += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/log/munged.log"]
        self._start("munged", "munged", "--foreground", "--force", *options, cwd=folder)
        deadline = time.monotonic() + 10
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        self._start("slurmctld", "slurmctld", "-D", "-i", cwd=folder)

    def start_node(self, node: str) -> None:
        """-b: as if the node had booted, so that jobs it had before are known to be lost."""
        self._start(node, "slurmd", "-D", "-b", "-N", node, cwd=self.folder / "spool" / node)

    def kill_node(self, node: str) -> None:
        """A power cut: slurmd, its slurmstepd and all their tasks at once."""
        _kill(lambda: _trees(self._roots(node)))

    def _roots(self, node: str) -> list[psutil.Process]:
        spool = str(self.folder / "spool" / node)
        return [process for process in _trees([psutil.Process()])[1:] if _cwd(process) == spool]


def _cwd(process: psutil.Process) -> str:
    try:
        return process.cwd()
    except psutil.Error:
        return ""


def _trees(roots: list[psutil.Process]) -> list[psutil.Process]:
    """`roots` and all that descends from them; a process that ends meanwhile is left out."""
    found = {process.pid: process for process in roots}
    for root in roots:
        try:
            found |= {process.pid: process for process in root.children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    return list(found.values())


def _kill(find: Callable[[], list[psutil.Process]]) -> None:
    """Stop everything that `find` returns, until nothing new appears, then kill it: no child slips away."""
    stopped: dict[int, psutil.Process] = {}
    while new := [process for process in find() if process.pid not in stopped]:
        for process in new:
            stopped[process.pid] = process
            _signal(process, signal.SIGSTOP)
    for process in stopped.values():
        _signal(process, signal.SIGKILL)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main(folder: Path, nodes: list[str]) -> None:
    """Start everything, obey the input until it closes, end everything."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
    signal.signal(signal.SIGCHLD, _reap)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests; they close the input
    daemons = Daemons(folder)
    verbs = {"start": daemons.start_node, "kill": daemons.kill_node}
    try:
        daemons.start_controller()
        for node in nodes:
            daemons.start_node(node)
        for line in sys.stdin:
            verb, node = line.split()
            verbs[verb](node)
            print("ok", flush=True)
    finally:
        _kill(lambda: _trees([psutil.Process()])[1:])
        while psutil.Process().children():
            time.sleep(0.01)
            _reap()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
