"""What is read from the words of Slurm's programs, and what they are given to work with."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_megatron.slurm import answers, facts, programs, scheduler
from elastic_megatron.slurm.answers import JobId, Queued

IDS = {
    "4711\n": JobId(4711),
    "4711;north\n": JobId(4711, "north"),
    "Submitted batch job 4711\n": JobId(4711),
    "Submitted batch job 4711 on cluster north-1\n": JobId(4711, "north-1"),
    "sbatch: lua: 2 nodes requested\nSubmitted batch job 4711\n": JobId(4711),
    "-----\n Welcome to login2, 2026\n-----\n4711\n": JobId(4711),
    "4711\r\nEstimated cost: 120 node hours of 3000\r\n": JobId(4711),
    "\x1b[32mSubmitted batch job \x1b[1m4711\x1b[0m\n": JobId(4711),
    "\x1b]0;login2\x07\ufeff4711\n": JobId(4711),
    "sbatch: 4711\n": JobId(4711),
    "Your job 4711 has been submitted\n": JobId(4711),
    "job id: 4711\n": JobId(4711),
    "1\n4711\n": None,  # which?
    "Submitted batch job 4711\nSubmitted batch job 4712\n": None,
    "job 3 of 5 submitted\n": None,
    "There are 120 jobs before yours\n": None,
    "thank you\n": None,
    "": None,
}


def test_an_id_is_read_where_an_answer_names_one_job_and_only_there() -> None:
    assert {said: answers.job_id(programs.lines(said.encode())) for said in IDS} == IDS


@given(st.binary(max_size=60), st.binary(max_size=60), st.integers(1, 10**8))
def test_no_noise_around_the_sentence_hides_the_id_or_breaks_the_reader(
    before: bytes, after: bytes, number: int
) -> None:
    """Any bytes on other lines: they can at most name another job, which makes the answer ambiguous."""
    said = before + b"\nSubmitted batch job %d\n" % number + after
    assert answers.job_id(programs.lines(said)) in (JobId(number), None)
    if b"\x1b" not in before:
        assert answers.job_id(programs.lines(before + b"\nSubmitted batch job %d" % number)) == JobId(number)


def test_all_lines_of_a_refusal_are_kept_without_the_programs_name() -> None:
    said = "sbatch: error: 2 ERRORS:\nsbatch: error:   no account\nSee https://site\nsbatch: fatal: no\nsbatch: lua: x\n"
    assert answers.reasons(programs.lines(said.encode())) == [
        "2 ERRORS:", "  no account", "See https://site", "no", "lua: x",
    ]  # fmt: skip


QUEUE = {
    "12|PENDING|Priority|N/A|0:00||a.b.c|/run/jobs/b/job.sbatch": Queued(
        12, "PENDING", "Priority", "N/A", "0:00", "", "a.b.c", "/run/jobs/b/job.sbatch"
    ),
    "12|RUNNING|None|2026-11-30T10:00:00|1:00|n[1-2]": Queued(
        12, "RUNNING", "None", "2026-11-30T10:00:00", "1:00", "n[1-2]"
    ),
    "12_[1-4]|PENDING|||": Queued(12, "PENDING", "", "", "", ""),
    "12+1 | RUNNING |": Queued(12, "RUNNING", "", "", "", ""),
    "12|PENDING|x|N/A|0:00||someone|else's|job": Queued(
        12, "PENDING", "x", "N/A", "0:00", "", "someone", "else's|job"
    ),
    "JOBID|STATE|REASON|START_TIME|TIME|NODELIST": None,
    "CLUSTER: north": None,
    "Welcome": None,
    "12": None,
    "|||||||": None,
}


def test_lines_of_squeue_are_jobs_or_passed_over() -> None:
    assert {line: next(answers.queued([line]), None) for line in QUEUE} == QUEUE


STATES = {
    "JobId=12 JobName=x UserId=me JobState=NODE_FAIL Reason=None": "NODE_FAIL",
    "CANCELLED by 1000": "CANCELLED",
    "CANCELLED+": "CANCELLED",
    "Welcome\nTIMEOUT": "TIMEOUT",
    "slurm_load_jobs error: Invalid job id specified": "",
    "": "",
}


def test_how_a_job_ended_is_one_word() -> None:
    assert {said: answers.end_state(said.splitlines()) for said in STATES} == STATES


def test_what_leaks_from_an_allocation_or_overrides_options_is_not_handed_on() -> None:
    """sbatch lets SBATCH_* win over a script, srun takes SLURM_* for options, squeue hides what SQUEUE_* filters."""
    leaks = """
        SLURM_JOB_ID SLURM_NTASKS SLURM_MEM_PER_NODE SLURM_CPUS_PER_TASK SLURM_TIME_FORMAT SRUN_DEBUG SALLOC_ACCOUNT
        SBATCH_TIMELIMIT SBATCH_ARRAY_INX SBATCH_ACCOUNT SQUEUE_PARTITION SQUEUE_STATES SCANCEL_INTERACTIVE
        SCONTROL_ALL SACCT_FORMAT PMIX_RANK CUDA_VISIBLE_DEVICES
    """
    kept = {"HOME", "PATH", "SLURM_CONF", "SLURM_HOME", "SLURM_CLUSTERS", "SLURMS", "SBATCH_QOS", "HF_TOKEN"}
    inherited = dict.fromkeys([*leaks.split(), *kept], "x")
    script = "#!/bin/bash\n#SBATCH --account=team\n#SBATCH --time=1:00\n"
    assert sorted(scheduler.environment(script, inherited)) == sorted(kept)
    assert sorted(scheduler.environment("", inherited)) == sorted(kept - {"SBATCH_QOS"})
    outside = {"CUDA_VISIBLE_DEVICES": "1", "SBATCH_ACCOUNT": "mine"}  # a user's own wish
    assert scheduler.environment("#SBATCH --qos=x\n", outside) == outside
    both = scheduler.environment("#SBATCH --clusters=a\n", {"SLURM_CLUSTERS": "b", "SBATCH_CLUSTERS": "c"})
    assert both == {}


SLOW = '#!/bin/bash\ncase "$*" in {which}) sleep 20; touch {ended};; esac\necho 1234abcd\n'


@pytest.mark.parametrize(
    ("git", "said"),
    [
        (SLOW.replace("{which}", "*status*"), "1234abcd+unknown"),
        (SLOW.replace("{which}", "*"), "unknown"),
        ("\x7fELF", "unknown"),
        ("#!/bin/bash\necho fatal: not a git repository >&2; exit 128\n", None),
        ("#!/bin/bash\ncase $* in *status*) ;; *) echo 1234abcd;; esac\n", "1234abcd"),
        ("#!/bin/bash\ncase $* in *status*) echo ' M x';; *) echo 1234abcd;; esac\n", "1234abcd+dirty"),
        ("", None),
    ],
)
def test_git_may_be_slow_broken_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, git: str, said: str | None
) -> None:
    """A slow one is not waited for: it has not come to its end when the answer is there."""
    if git:
        (tmp_path / "git").write_text(git.replace("{ended}", str(tmp_path / "ended")))
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin" if "sleep" in git else str(tmp_path))
    monkeypatch.setattr(facts, "PATIENCE", 1.0)
    assert facts.commit(tmp_path) == said
    assert not (tmp_path / "ended").exists()


def test_a_program_is_left_alone_at_the_limit_with_what_it_said(tmp_path: Path) -> None:
    """Also where its children hold its output open, or it asks a question that nobody answers."""
    os.mkfifo(tmp_path / "fifo")
    background = programs.run(["bash", "-c", f"(: <{tmp_path}/fifo) & echo said"], 10)
    assert (background.status, background.out) == (0, ("said",))
    (tmp_path / "fifo").write_text("")  # the child ends
    hangs = programs.run(["bash", "-c", "echo $$; sleep 60; exit"], 1)
    assert hangs.status is None and len(hangs.out) == 1
    with contextlib.suppress(ChildProcessError):
        ended = os.waitid(os.P_PID, int(hangs.out[0]), os.WEXITED)
        assert ended is not None and ended.si_code == os.CLD_KILLED
    asks = programs.run(["bash", "-c", "read -p 'sure? ' x; echo got $?"], 10)
    assert asks.out == ("got 1",)
