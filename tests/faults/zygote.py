"""A process that has imported everything and runs each command in a fork of itself: a trial costs what it does.

    with Zygote() as zygote:
        [ran] = zygote.run(Run(["import", "hf", "ckpt"], folder, strike=Strike("signal", 12, signal.SIGKILL)))

Commands of one call run side by side. Each is a process group of its own, ends after ``seconds`` at the latest, and
leaves nothing running: what it left is counted and killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from moments import Counter, Strike, watch
from processes import data_size, kill_group

SECONDS = 300.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_MODULES = (
    "matplotlib.backends.backend_agg", "matplotlib.font_manager", "modelopt.torch.quantization", "transformers",
    "torch.distributed.checkpoint", "elastic_megatron.cli", "elastic_megatron.commands.rank",
    "elastic_megatron.conversion", "elastic_megatron.data.prepare", "elastic_megatron.report.page",
    "elastic_megatron.training.quantize", "elastic_megatron.training.train",
)  # fmt: skip
_KEPT = 4000  # characters of output that are kept, from its end


@dataclass(frozen=True)
class Run:
    """A command to run.

    Args:
        argv: of ``elastic-megatron``, or ``["module:function", argument, ...]`` of the harness.
        folder: to run in; an absolute path.
        strike: what happens at one of its calls to the file system.
        after: seconds until ``number`` is sent to it (9: to it and all that it started).
        delay: seconds until it is started.
        gate: a file whose appearance starts it, or the end of all that run beside it.
        opens: a file to make once it has ended.
        user: to run as, given that the starter is root.
        file_size: bytes that no file may exceed.
        memory_mib: that it may allocate beyond what the zygote has, so that a runaway ends by itself.
    """

    argv: list[str]
    folder: str
    environment: Mapping[str, str] = field(default_factory=dict)
    strike: Strike | None = None
    after: float | None = None
    number: int = 0
    delay: float = 0.0
    gate: str = ""
    opens: str = ""
    user: int | None = None
    file_size: int | None = None
    memory_mib: int | None = None
    seconds: float = SECONDS


@dataclass(frozen=True)
class Ran:
    """How it ended: exit status (negative for a signal), output, seconds, resident memory at its peak.

    ``calls`` are those that were counted, ``struck`` says which one the strike fell on, ``hung`` whether its time was
    up, ``left`` how many processes it left running.
    """

    status: int
    out: str
    err: str
    wall: float
    cpu: float
    mib: float
    calls: int
    struck: str
    hung: bool
    left: int

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.err or "defect of elastic-megatron" in self.err

    @property
    def last(self) -> str:
        """The last line of what it said, for a finding."""
        lines = [line for line in self.err.splitlines() if line.strip() and "please report it" not in line]
        return lines[-1].strip()[:300] if lines else ""


class Zygote:
    """The near side: starts the process, and asks it to run commands."""

    def __init__(self) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        paths = os.pathsep.join(p for p in sys.path if p)
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            [sys.executable, "-u", str(Path(__file__))],
            env=os.environ | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # Ctrl-C is for the near side, which then ends this one
        )

    def run(self, *runs: Run) -> list[Ran]:
        """Run commands side by side, and wait for all of them."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([asdict(run) for run in runs]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self._log.seek(0)
            raise RuntimeError(f"the zygote ended with {self._process.wait(30)}: {self._log.read()[-_KEPT:]}")
        return [Ran(**ran) for ran in json.loads(answer)]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=30)
        self._log.close()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Child:
    """A forked command, on the far side."""

    def __init__(self, run: Run, output: Path) -> None:
        self.run, self.output, self.counter = run, output, Counter()
        self.started = time.monotonic()
        self.hung, self.number = False, run.number
        # a signal at once must meet the command, not this code's copy in the child
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        self.pid = os.fork()
        if self.pid == 0:
            _command(run, output, self.counter)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        with contextlib.suppress(OSError):  # the child does the same; whoever is first
            os.setpgid(self.pid, self.pid)
        self.descriptor = os.pidfd_open(self.pid)

    @property
    def due(self) -> float:
        """When something has to be done to it."""
        after = self.run.after if self.number and self.run.after is not None else self.run.seconds
        return self.started + min(after, self.run.seconds)

    def act(self) -> None:
        """Send what is due: the signal that was ordered, or the end of its time."""
        self.hung = not self.number
        number, self.number = self.number or signal.SIGKILL, 0
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if number == signal.SIGKILL else os.kill)(self.pid, number)

    def ended(self) -> dict[str, Any]:
        wall = time.monotonic() - self.started
        _, status, usage = os.wait4(self.pid, 0)
        os.close(self.descriptor)
        left = kill_group(self.pid)
        out, err = (_tail(self.output.with_suffix(kind)) for kind in (".out", ".err"))
        ran = Ran(
            os.waitstatus_to_exitcode(status), out, err, wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, self.counter.count,
            self.counter.noted, self.hung, left,
        )  # fmt: skip
        return asdict(ran)


def serve() -> None:
    """The far side: runs in, how they ended out."""
    _import_all()
    answers = os.dup(1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="zygote-") as folder:
        for line in sys.stdin:
            runs = [Run(**(r | {"strike": r["strike"] and Strike(**r["strike"])})) for r in json.loads(line)]
            os.write(answers, (json.dumps(_all(runs, Path(folder))) + "\n").encode())


def _all(runs: list[Run], folder: Path) -> list[dict[str, Any]]:
    begun = time.monotonic()
    waiting = dict(enumerate(runs))
    children: dict[int, _Child] = {}
    results: dict[int, dict[str, Any]] = {}
    while len(results) < len(runs):
        for i, run in list(waiting.items()):
            ready = not run.gate or Path(run.gate).exists() or len(children) + len(waiting) == 1
            if ready and time.monotonic() >= begun + run.delay:
                children[i] = _Child(waiting.pop(i), folder / str(i))
        poll = select.poll()
        for child in children.values():
            poll.register(child.descriptor, select.POLLIN)
        until = min((child.due for child in children.values()), default=0.0) - time.monotonic()
        poll.poll(10 if waiting else max(0, 1000 * until + 1))
        for i, child in list(children.items()):
            if select.select([child.descriptor], [], [], 0)[0]:
                results[i] = children.pop(i).ended()
                if runs[i].opens:
                    Path(runs[i].opens).touch()
            elif time.monotonic() >= child.due:
                child.act()
    return [results[i] for i in range(len(runs))]


def _import_all() -> None:
    """All that commands import, once. No thread may be started here: it would not survive the forks."""
    for name in _MODULES:
        import_module(name)
    import_module("torch").set_num_threads(1)


def _command(run: Run, output: Path, counter: Counter) -> NoReturn:
    """In the child: the command, and never back into the parent's code."""
    status = 1
    try:
        os.setpgid(0, 0)
        for kind, number in ((".out", 1), (".err", 2)):
            descriptor = os.open(output.with_suffix(kind), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(descriptor, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.environ.update(run.environment)
        os.chdir(run.folder)
        if run.file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (run.file_size, run.file_size))
        if run.memory_mib is not None:
            limit = data_size() + (run.memory_mib << 20)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        if run.user is not None:
            os.setgroups([])
            os.setgid(run.user)
            os.setuid(run.user)
        if run.strike is not None:
            watch(run.strike, Path(run.folder), counter)
        status = _main(run.argv)
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except KeyboardInterrupt:  # before the command could catch it
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _main(argv: list[str]) -> int:
    if ":" in argv[0]:
        module, _, name = argv[0].partition(":")
        getattr(import_module(module), name)(*argv[1:])
        return 0
    from elastic_megatron.cli import main

    return main(argv)


def _tail(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as f:
        f.seek(max(0, path.stat().st_size - 4 * _KEPT))
        return f.read().decode(errors="replace")[-_KEPT:]


if __name__ == "__main__":
    serve()
