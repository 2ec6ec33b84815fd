"""A real Slurm cluster on loopback for tests: munge, slurmctld and N slurmd, without systemd, cgroups or database.

    with LocalSlurm(nodes=4) as slurm:
        slurm.run("srun", "-N2", "hostname")

Nodes are named by loopback addresses (127.x.y.1 ...), which resolve everywhere without a line in the hosts
file. Ports, names and job ids differ between clusters that run side by side. The commands of Slurm find the
cluster by ``SLURM_CONF`` in `LocalSlurm.env`, which is never put into the environment of the tests.
`slurm_daemons` owns the processes.
"""

from __future__ import annotations

import getpass
import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from slurm_daemons import DAEMONS, which_daemon

HERE = Path(__file__).parent
COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
STUB_SOURCE = HERE / "pyxis_stub.c"
BLOCK = 70  # ports apart; also the nodes that one cluster may have

CONF = """\
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
FirstJobId={first_job}
AuthType=auth/munge
# cred_expire: how long a requeued job waits before it may start again (default 120 s)
AuthInfo=socket={folder}/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
PlugStackConfig={folder}/plugstack.conf
# no cgroups, no affinity, no MPI, no mail, no accounting database
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# quick reactions, because tests wait on them
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=200000,bf_interval=2
KillWait=30
InactiveLimit=0
MinJobAge=3600
MessageTimeout=20
SlurmctldTimeout=30
SlurmdTimeout=10
# a node that was down is used again as soon as its slurmd registers
ReturnToService=2
JobRequeue=1
# config_overrides: nodes may claim more CPUs than this machine has
SlurmdParameters=config_overrides
NodeName={names} NodeHostname=localhost NodeAddr={names} Port=[{first}-{last}] CPUs=8 Boards=1 \
SocketsPerBoard=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=UNLIMITED DefaultTime=10 State=UP
PartitionName=interactive Nodes=ALL MaxTime=60 DefaultTime=5 State=UP
"""


def missing() -> str | None:
    """Why no cluster can run here, in one line; None where one can."""
    absent = [name for name in DAEMONS if not which_daemon(name)]
    absent += [name for name in COMMANDS if not shutil.which(name)]
    return f"Slurm is not installed ({', '.join(absent)}): run tests/slurm/install.sh" if absent else None


def missing_for_stub() -> str | None:
    """Why the container stub cannot be built here, in one line; None where it can."""
    if not shutil.which("gcc"):
        return "no gcc to build tests/slurm/pyxis_stub.c: run tests/slurm/install.sh"
    if not Path("/usr/include/slurm/spank.h").exists():
        return "no slurm/spank.h (libslurm-dev) to build tests/slurm/pyxis_stub.c: run tests/slurm/install.sh"
    return None


def build_pyxis_stub(folder: Path) -> Path:
    """Compile the stand-in for pyxis into `folder`; the path of the plug-in."""
    plugin = folder / "pyxis_stub.so"
    command = ["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(plugin), str(STUB_SOURCE)]
    subprocess.run(command, check=True, timeout=60)
    return plugin


def wait_until(reached: Callable[[], object], what: str, timeout: float = 30) -> None:
    """Ask `reached` ten times a second; AssertionError with `what` when `timeout` seconds have passed."""
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline, f"not within {timeout} s: {what}"
        time.sleep(0.1)


def _free_block() -> int:
    """The first of `BLOCK` ports in a row that were free just now.

    Below the ports that the kernel gives to clients, and above 15000 to 24999, the rendezvous ports of jobs.
    """
    while True:
        first = 25000 + BLOCK * random.randrange((32000 - 25000) // BLOCK)
        sockets: list[socket.socket] = []
        try:
            for port in range(first, first + BLOCK):
                sockets.append(socket.socket())
                sockets[-1].bind(("", port))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()


class LocalSlurm:
    """A running cluster, as a context manager. Its jobs and daemons end with it, jobs first."""

    def __init__(self, nodes: int = 4, plugins: Sequence[Path] = ()) -> None:
        """`nodes`: how many slurmd; `plugins`: SPANK plug-ins that every srun and sbatch must load."""
        assert 0 < nodes < BLOCK
        self._port = _free_block()
        self._prefix = f"127.{self._port >> 8}.{self._port & 255}."
        self._plugins = plugins
        self.nodes = [f"{self._prefix}{index + 1}" for index in range(nodes)]
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: it holds a socket
        # bytecode is kept: otherwise every rank compiles torch anew, which takes longer than to train
        left_out = ("SLURM", "SBATCH", "SRUN", "PYTHONDONTWRITEBYTECODE")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        self.env = inherited | {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def __enter__(self) -> LocalSlurm:
        self._write_files()
        command = [sys.executable, str(HERE / "slurm_daemons.py"), str(self.folder), *self.nodes]
        self._owner = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            self._wait_for_idle()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _write_files(self) -> None:
        folder, last = self.folder, len(self.nodes)
        for name in ["state", "log", "gpu", *(f"spool/{node}" for node in self.nodes)]:
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)  # munge's clients must reach the socket, whoever they are
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        for index in range(8):
            (folder / "gpu" / str(index)).touch()
        names = f"{self._prefix}[1-{last}]"
        # a GPU is any file that exists: slurmd drops GPUs that are only counted
        (folder / "gres.conf").write_text(f"NodeName={names} Name=gpu File={folder}/gpu/[0-7]\n")
        (folder / "plugstack.conf").write_text("".join(f"required {plugin}\n" for plugin in self._plugins))
        conf = CONF.format(
            folder=folder,
            user=getpass.getuser(),
            names=names,
            port=self._port,
            first=self._port + 1,
            last=self._port + last,
            # jobs derive ports from their ids: clusters side by side must not share ids
            first_job=(self._port - 25000) // BLOCK * 100 + 1,
        )
        (folder / "slurm.conf").write_text(conf)

    def states(self) -> dict[str, str]:
        """Each node's state in short: idle, mix, alloc, down, comp ...; a star where it does not answer."""
        lines = self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %t").splitlines()
        return dict(line.split() for line in lines)

    def _wait_for_idle(self) -> None:
        def idle() -> bool:
            return list(self.states().values()) == ["idle"] * len(self.nodes)

        try:
            wait_until(idle, "all nodes idle")
        except AssertionError as error:
            raise RuntimeError(f"{error}\n{self.logs()}") from None

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        tails: list[str] = []
        for path in sorted((self.folder / "log").glob("*.log")):
            lines = [line for line in path.read_text(errors="replace").splitlines() if "pmi" not in line]
            tails += [f"--- {path.name}", *lines[-8:]]
        return "\n".join(tails)

    def run(self, *command: str, timeout: float = 30, check: bool = True, cwd: Path | None = None) -> str:
        """Standard output of a command that finds this cluster; AssertionError with all output if it fails."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout, cwd=cwd)
        said = f"{' '.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        assert not check or done.returncode == 0, said
        return done.stdout

    def sbatch(self, script: str, *options: str, cwd: Path | None = None) -> int:
        """Submit the text of a shell script; the job's id. The log goes to `cwd` by Slurm's default name."""
        path = self.folder / f"{secrets.token_hex(4)}.sbatch"
        path.write_text(f"#!/bin/bash\n{script}\n")
        return int(self.run("sbatch", "--parsable", *options, str(path), cwd=cwd or self.folder))

    def job(self, job: int) -> dict[str, str]:
        """What ``scontrol show job`` knows of a job, values cut at the first blank."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", str(job))))

    def wait_for(self, job: int, *states: str, timeout: float = 30) -> dict[str, str]:
        """The job's description once its state is one of `states`."""
        try:
            wait_until(lambda: self.job(job)["JobState"] in states, f"job {job} in {states}", timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.run('scontrol', 'show', 'job', str(job))}") from None
        return self.job(job)

    def kill_node(self, node: str) -> None:
        """A node loses power: its slurmd and all its tasks are gone at once."""
        self._order("kill", node)

    def start_node(self, node: str) -> None:
        """A node that was lost boots again; returns when it can take jobs.

        Set down by hand first: a controller that had not yet noticed the loss would mix up old and new.
        """
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost")
        self._order("start", node)
        wait_until(lambda: self.states()[node] in ("idle", "mix", "alloc"), f"{node} is up")

    def reachable(self, node: str) -> bool:
        """Whether the node's slurmd takes connections; the controller may take half a minute to notice."""
        with socket.socket() as probe:
            return probe.connect_ex((node, self._port + 1 + self.nodes.index(node))) == 0

    def _order(self, verb: str, node: str) -> None:
        assert node in self.nodes and self._owner.stdin and self._owner.stdout
        print(verb, node, file=self._owner.stdin, flush=True)
        assert self._owner.stdout.readline() == "ok\n", f"{verb} {node} failed\n{self.logs()}"

    def reset(self) -> None:
        """As at the start, for the next test: no jobs, all nodes up and idle."""
        self.run("scancel", "--user", getpass.getuser(), "--full")
        for node in self.nodes:
            if not self.reachable(node):
                self.start_node(node)
        self._wait_for_idle()

    def processes(self) -> list[psutil.Process]:
        """All processes of the cluster, tasks included; zombies count as gone."""
        try:
            found = psutil.Process(self._owner.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [each for each in found if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]

    def stop(self) -> None:
        """End the jobs, then the daemons; returns when no process is left. Harmless when already stopped."""
        assert self._owner.stdin
        self._owner.stdin.close()
        self._owner.wait(timeout=30)
