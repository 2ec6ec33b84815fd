"""What Slurm's programs say, and what sites' wrappers around them make of it. Pure text; nothing is run here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

_PREFIX = re.compile(r"^(?:sbatch|squeue|scancel|scontrol|sacct): (?:(?:error|fatal|info): )?")
_REFUSED = re.compile(r"batch job submission failed|allocation failure", re.IGNORECASE)
_LOST = re.compile(
    r"timed? ?out|unable to contact|communication|connection|zero bytes|controller.*(busy|respond)",
    re.IGNORECASE,
)
_TROUBLE = re.compile(r"\berror\b|\bfatal\b|timed? ?out|unable to|fail", re.IGNORECASE)
# from the surest way in which sbatch names a job to the vaguest
_NAMED = (
    re.compile(r"submitted batch job (?P<id>\d+)(?: (?:on|to) cluster (?P<cluster>[\w.-]+))?", re.IGNORECASE),
    re.compile(r"^(?P<id>\d+)(?:;(?P<cluster>[\w.-]+))?$"),
    re.compile(
        r"^(?=.*\b(?:submitted|queued|accepted|id)\b)\D*\bjob(?:_?id)?\b\D*(?P<id>\d+)\D*$", re.IGNORECASE
    ),
)


@dataclass(frozen=True)
class JobId:
    """A job's number, and the cluster that sbatch names beside it where a site has several."""

    number: int
    cluster: str = ""


def reasons(said: Iterable[str]) -> list[str]:
    """The lines of a refusal without the names of programs in front, each once, in order."""
    return list(dict.fromkeys(_PREFIX.sub("", line) for line in said))


def job_id(said: Sequence[str]) -> JobId | None:
    """The job that an answer of sbatch names; ``None`` where it names none, or several."""
    lines = [_PREFIX.sub("", line) for line in said]
    for pattern in _NAMED:
        found = {
            JobId(int(m["id"]), m.groupdict().get("cluster") or "") for m in map(pattern.search, lines) if m
        }
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def refuses(said: Iterable[str]) -> bool:
    """Does an answer say that the job was not taken, whatever the exit status?"""
    return any(_REFUSED.search(line) for line in said)


def leaves_open(said: Iterable[str]) -> bool:
    """Does a refusal sound as if the controller may have taken the job all the same?"""
    return any(_LOST.search(line) for line in said)


def in_trouble(said: Iterable[str]) -> bool:
    """Is an answer without any job the words of a program that failed?"""
    return any(_TROUBLE.search(line) for line in said)


@dataclass(frozen=True)
class Queued:
    """A job in the queue: Slurm's state, why it waits, when it should start, how long it has run, and on which nodes.

    ``name`` and ``command``, the script's path, are empty where the answer leaves them out; ``cluster`` is the one that
    was asked, where a site has several.
    """

    id: int
    state: str
    reason: str
    start: str
    elapsed: str
    nodes: str
    name: str = ""
    command: str = ""
    cluster: str = ""


QUEUE_FORMAT = "%A|%T|%r|%S|%M|%N|%j|%o"


def queued(said: Iterable[str]) -> Iterator[Queued]:
    """The jobs that squeue names in ``QUEUE_FORMAT``; banners, headings and whatever else are passed over."""
    for line in said:
        fields = [field.strip() for field in line.split("|", 6)]
        number = re.match(r"\d+", fields[0])  # of an array or a heterogeneous job, the number in front
        if number is None or len(fields) < 2 or not re.fullmatch(r"[A-Z_]+", fields[1]):
            continue
        first = (fields[1:6] + [""] * 5)[:5]
        name, _, command = fields[6].partition("|") if len(fields) > 6 else ("", "", "")
        yield Queued(int(number[0]), *first, name, command)


def end_state(said: Iterable[str]) -> str:
    """How a job ended, in Slurm's one word, from ``scontrol show job`` or sacct; empty where neither says it."""
    for line in said:
        if found := re.search(
            r"\bJobState=([A-Z_]+)|^([A-Z_]{4,})\b", line
        ):  # "CANCELLED by 1000", "CANCELLED+"
            return found[1] or found[2]
    return ""
