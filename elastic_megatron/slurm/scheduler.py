"""Slurm's own commands, each under a time limit: a controller that does not answer must not hang a terminal."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from . import answers, programs
from .answers import JobId, Queued
from .programs import Answer

TIMEOUT = 60.0
_GONE = re.compile(r"invalid job id|already (completing|completed|finished)", re.IGNORECASE)
# Seconds before each look for a job of which no answer came: a busy controller may take it a little later. None
# begins after a minute.
LOOKS = (0.0, 2.0, 4.0, 8.0)
# How Slurm's programs find their controller, and the site its Slurm
_KEPT = re.compile(r"SLURM_(CONF|CONF_SERVER|JWT|CLUSTERS|\w*(HOME|ROOT|PREFIX|PATH|BIN))")
_LEAKS = re.compile(r"(SLURM|SLURMD|SRUN|SALLOC|SBATCH|SQUEUE|SCANCEL|SCONTROL|SACCT|PMI|PMIX)_")
# What an allocation's shell has been given, and another job must not inherit
_DEVICES = {
    "CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK",
}  # fmt: skip
# A user's own defaults, which hold where a script says nothing; sbatch would have them win over it
_DEFAULTS = ("account", "partition", "qos", "constraint", "reservation", "clusters", "wckey")


def available() -> bool:
    """Is there a Slurm to submit to?"""
    return shutil.which("sbatch") is not None


def environment(script: str = "", inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for Slurm's programs: without what an allocation's shell holds and what overrides options.

    ``script``: what sbatch is given; variables for options that it states are left out too.
    """
    stated = set(re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE))
    mine = {f"SBATCH_{flag.upper()}" for flag in _DEFAULTS if flag not in stated} if script else set()
    leaks = _DEVICES if "SLURM_JOB_ID" in inherited else set[str]()
    leaks |= {"SLURM_CLUSTERS"} if "clusters" in stated else set[str]()
    return {
        name: value
        for name, value in inherited.items()
        if name in mine or (name not in leaks and (_KEPT.fullmatch(name) or not _LEAKS.match(name)))
    }


@dataclass(frozen=True)
class Sent:
    """What came of an sbatch: the job that its answer names, whether it ended well, and its words.

    ``open``: it may have been taken although the answer does not say so.
    """

    job: JobId | None
    ok: bool
    open: bool
    words: tuple[str, ...]


def sbatch(script: Path, dependency: str = "") -> Sent:
    """Submit a script once. Raises ``UserError`` where there is no sbatch, and ``OSError`` without the script."""
    options = [f"--dependency={dependency}"] if dependency else []
    env = environment(script.read_text(errors="replace"))
    said = _call(["sbatch", "--parsable", *options, str(script)], env)
    job = answers.job_id(said.out + said.err)
    ok = said.status == 0 and not answers.refuses(said.lines)
    lost = ok or said.status is None or job is not None or answers.leaves_open(said.lines)
    return Sent(job, ok, lost, tuple(_words("sbatch", said)))


def refusal(script: str) -> str:
    """What Slurm has against a script (``sbatch --test-only``), a line each; empty where it would take it."""
    said = _call(["sbatch", "--test-only"], environment(script), script)
    return "\n".join(_words("sbatch", said)) if said.status != 0 or answers.refuses(said.lines) else ""


def mine(clusters: Collection[str] = ("",)) -> list[Queued]:
    """All jobs of the user that wait or run, oldest first. Needs no accounting database.

    Raises ``UserError`` where that cannot be known just now.
    """
    found = []
    for cluster in sorted({*clusters}):
        # --me is younger than some clusters
        command = ["squeue", *_on(cluster), f"--user={os.geteuid()}", "--noheader"]
        said = _run([*command, f"--format={answers.QUEUE_FORMAT}"])
        jobs = [replace(job, cluster=cluster) for job in answers.queued(said.out)]
        if not jobs and answers.in_trouble(said.lines):
            raise UserError(f"squeue failed: {'; '.join(_words('squeue', said))}")
        found += jobs
    return sorted(found, key=lambda job: job.id)


def find(name: str, known: Collection[int], patient: bool, clusters: Collection[str] = ("",)) -> list[Queued]:
    """Jobs in the queue of this name, which is nobody else's, but for those that are known already.

    Args:
        patient: look again for some seconds while there is none.

    Raises ``UserError`` where squeue does not say at the last look.
    """
    deadline = time.monotonic() + TIMEOUT
    for pause in LOOKS if patient else LOOKS[:1]:
        time.sleep(pause)
        last = not patient or pause == LOOKS[-1] or time.monotonic() > deadline
        try:
            found = [q for q in mine(clusters) if q.id not in known and q.name in (name, "")]
        except UserError:
            if last:
                raise
            continue
        if found or last:
            return found
    return []


def own_cluster() -> str:
    """The name of the cluster that answers without ``--clusters``; empty where that cannot be known."""
    if shutil.which("scontrol") is None:
        return ""
    said = _call(["scontrol", "show", "config"], environment())
    return next((m[1] for line in said.out if (m := re.match(r"ClusterName\s*=\s*(\S+)", line))), "")


def last_state(job: JobId) -> str:
    """How a job that is not in the queue ended, in Slurm's word; empty where nobody remembers.

    The controller forgets jobs after ``MinJobAge``; accounting remembers them where a site has it. Raises
    ``UserError`` where the controller does not answer.
    """
    on = _on(job.cluster)
    said = _run(["scontrol", *on, "--oneliner", "show", "job", str(job.number)], tolerate=_GONE)
    if state := answers.end_state(said.out):
        return state
    if shutil.which("sacct") is None:
        return ""
    command = ["sacct", *on, "--noheader", "--parsable2", "--allocations", "--format=State"]
    try:
        return answers.end_state(_run([*command, f"--jobs={job.number}"]).out)
    except UserError:  # no accounting here, which is no fault of the user's
        return ""


def cancel(jobs: Iterable[JobId]) -> None:
    """Take jobs out of the queue; those that run get TERM, and time to save. Raises ``UserError`` where one stays."""
    jobs = list(jobs)
    for cluster in sorted({job.cluster for job in jobs}):
        ids = [str(job.number) for job in jobs if job.cluster == cluster]
        _run(["scancel", *_on(cluster), *ids], tolerate=_GONE)


def _on(cluster: str) -> list[str]:
    return [f"--clusters={cluster}"] if cluster else []


def _run(command: Sequence[str], tolerate: re.Pattern[str] | None = None) -> Answer:
    """A command's answer. Raises ``UserError`` where it fails, unless all that it complains of is tolerated."""
    said = _call(command, environment())
    complaints = said.lines if said.status != 0 else ()
    if said.status is None or (
        said.status != 0 and not (tolerate and complaints and all(map(tolerate.search, complaints)))
    ):
        raise UserError(f"{command[0]} failed: {'; '.join(_words(command[0], said))}")
    return said


def _call(command: Sequence[str], env: Mapping[str, str], text: str = "") -> Answer:
    program = command[0]
    if shutil.which(program) is None:
        raise UserError(f"{program} is not installed here; run this on a login node of the cluster")
    try:
        return programs.run(command, TIMEOUT, env, text)
    except OSError as error:
        raise UserError(
            f"{program} cannot be started: {error.strerror}; ask those who run the cluster"
        ) from None


def _words(program: str, said: Answer) -> list[str]:
    """Why a command failed, in its own words."""
    silent = f"{program} did not answer within {TIMEOUT:.0f} s; is the Slurm controller up? (scontrol ping)"
    unsaid = silent if said.status is None else f"no reason given (status {said.status})"
    return answers.reasons(said.lines) + [silent] * (said.status is None) or [unsaid]
