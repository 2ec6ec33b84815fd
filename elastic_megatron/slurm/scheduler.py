"""Slurm's own commands, each under a time limit: a controller that does not answer must not hang a terminal."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

TIMEOUT = 60.0
_GONE = re.compile(r"Invalid job id", re.IGNORECASE)


@dataclass(frozen=True)
class Queued:
    """A job in the queue: Slurm's state, why it waits (or ``None``), when it should start, how long it has run."""

    id: int
    state: str
    reason: str
    start: str
    elapsed: str
    nodes: str


def available() -> bool:
    """Is there a Slurm to submit to?"""
    return shutil.which("sbatch") is not None


def sbatch(script: Path, dependency: str = "") -> int:
    """Submit a script; the job's id. Raises ``UserError`` with Slurm's words where it refuses."""
    options = [f"--dependency={dependency}"] if dependency else []
    out = _run(["sbatch", "--parsable", *options, str(script)])
    return int(out.split(";")[0])


def refusal(script: str) -> str:
    """What Slurm has against a script (``sbatch --test-only``); empty where it would take it."""
    _need("sbatch")
    try:
        done = subprocess.run(
            ["sbatch", "--test-only"], input=script, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return _silent("sbatch")
    return "" if done.returncode == 0 else _last_line(done.stderr)


def queue(ids: Iterable[int]) -> dict[int, Queued]:
    """Those of the jobs that wait or run. Needs no accounting database."""
    wanted = set(ids)
    out = _run(["squeue", "--me", "--noheader", "--format=%A|%T|%r|%S|%M|%N"]) if wanted else ""
    found = {}
    for line in out.splitlines():
        number, state, reason, start, elapsed, nodes = line.split("|", 5)
        if int(number) in wanted:
            found[int(number)] = Queued(int(number), state, reason, start, elapsed, nodes)
    return found


def last_state(id: int) -> str:
    """How a job that is not in the queue ended, in Slurm's word; empty where nobody remembers.

    The controller forgets jobs after ``MinJobAge``; accounting remembers them where a site has it.
    """
    out = _run(["scontrol", "--oneliner", "show", "job", str(id)], tolerate=_GONE)
    if found := re.search(r"\bJobState=(\w+)", out):
        return found[1]
    if shutil.which("sacct") is None:
        return ""
    try:
        out = _run(["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={id}"])
    except UserError:  # no accounting here, which is no fault of the user's
        return ""
    return out.split()[0] if out.split() else ""


def cancel(ids: Sequence[int]) -> None:
    """Take jobs out of the queue; those that run get TERM, and time to save."""
    if ids:
        _run(["scancel", *map(str, ids)], tolerate=_GONE)


def _run(command: Sequence[str], tolerate: re.Pattern[str] | None = None) -> str:
    """Standard output of a command. Raises ``UserError`` where it fails, unless its words match ``tolerate``."""
    _need(command[0])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise UserError(_silent(command[0])) from None
    if done.returncode and not (tolerate and tolerate.search(done.stderr)):
        raise UserError(f"{command[0]} refused: {_last_line(done.stderr)}")
    return done.stdout


def _need(program: str) -> None:
    if shutil.which(program) is None:
        raise UserError(f"{program} is not installed here; run this on a login node of the cluster")


def _silent(program: str) -> str:
    return f"{program} did not answer within {TIMEOUT:.0f} s; is the Slurm controller up? (scontrol ping)"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return re.sub(r"^\w+: (error|fatal): ", "", lines[-1]) if lines else "no reason given"
