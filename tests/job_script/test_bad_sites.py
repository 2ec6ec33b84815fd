"""A job script on a site where things fail: setup lines, disks, ports, Slurm's own programs. It never loses its status."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from job_shell import Machine

from elastic_megatron.slurm import record, scheduler
from elastic_megatron.slurm.record import Attempt, JobRecord, Record
from elastic_megatron.slurm.state import JobState, states


def machine(root: Path, setup: str = "[]", more: str = "", **fields: Any) -> Machine:
    text = f"container: {{runtime: none, bin: {root / 'bin'}}}\nsetup: {setup}\n{more}"
    return Machine(root, cluster=text, **fields)


def only(here: Machine) -> Attempt:
    (attempt,) = record.attempts(here.root / "run", "train")
    return attempt


def state(here: Machine) -> JobState:
    """What `status` says where there is no Slurm to ask."""
    return states(Record(here.root / "run", "r", {"train": JobRecord((12345,), (), 1)}))[0]


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "available", lambda: False)


def log(here: Machine, attempt: int = 1) -> str:
    return (here.job / f"logs/attempt_{attempt}.log").read_text()


# setup lines, the status of the attempt, and the line that is named
FAILING = {
    "a command that is not there": ('["module_load cuda/12.4"]', 127, "module_load cuda/12.4"),
    "a function, as module is": ('["module() { false; true; return 3; }", "module load x  # y"]', 3, "module load x"),
    "a sourced file": ('["source nowhere.sh"]', 1, "source nowhere.sh"),
    "a later line": ('["export A=1", "false | true", "cd /nowhere", "export B=1"]', 1, "cd /nowhere"),
    "with a status that ranks mean something by": ('["(exit 2)"]', 2, "(exit 2)"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILING)
def test_a_setup_line_that_fails_ends_the_attempt_in_its_own_words(tmp_path: Path, case: str) -> None:
    """No rank starts. The node may be at fault, so that the job goes back to the queue, up to ``max_failures`` times."""
    setup, status, line = FAILING[case]
    here = machine(tmp_path, setup, slurm="continuation: {kind: requeue, max_failures: 2}")
    assert here.run() == -15 and here.called("scontrol") == ["requeue 12345"]
    assert (only(here).exit, here.ranks()) == (status, [])
    assert f"a setup line of the cluster file failed: {line}" in only(here).why and line in log(here)
    assert here.run() == status and len(here.called("scontrol")) == 1
    assert state(here).state == "failed" and line in state(here).detail


HARMLESS = [
    "[ -d /nowhere ] && export A=1",
    "false || true",
    "if false; then",
    "true",
    "fi",
    "source own.sh",
    "unset -v Z",
]


def test_what_fails_inside_a_setup_line_without_failing_it_is_its_own_business(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.sh").write_text("false\nexport WANDB_ENTITY=team\n")
    here = machine(tmp_path, str(HARMLESS))
    assert here.run("exit 7") == -15 and (only(here).exit, only(here).why) == (7, "")
    assert here.ranks()[0]["environment"]["WANDB_ENTITY"] == "team"  # type: ignore[index]


def test_a_setup_line_that_leaves_is_no_success(tmp_path: Path) -> None:
    here = machine(tmp_path, '["exit 0"]', slurm="continuation: {kind: none}")
    assert here.run() == 1 and here.ranks() == []
    assert only(here).exit == 1 and not record.done(tmp_path / "run", "train")


def blocked(path: Path) -> None:
    """Nothing can be written under this name, also not by root: a folder stands there."""
    (path / "in the way").mkdir(parents=True)


@pytest.mark.parametrize("status", [0, 75])
@pytest.mark.parametrize(
    "name", ["logs/attempt_1.log", "attempts", "failures.new", "failures", "done", "logs/latest"]
)
def test_the_status_survives_whatever_cannot_be_written(tmp_path: Path, name: str, status: int) -> None:
    here = machine(tmp_path, slurm="continuation: {kind: requeue, max_failures: 1}")
    here.chain()
    blocked(here.job / name)
    assert here.run(f"exit {status}") == (0 if name == "done" else status)
    assert name == "done" or len(here.ranks()) == 4
    assert name != "logs/attempt_1.log" or not (here.job / "logs/latest").is_symlink()


def test_a_crash_loop_ends_also_where_it_cannot_be_counted(tmp_path: Path) -> None:
    """A full disk: Slurm's own count of restarts stands in. With a newer checkpoint there is no loop."""
    here = machine(tmp_path, slurm="continuation: {kind: requeue, max_failures: 2}")
    here.chain()
    blocked(here.job / "failures.new")
    assert [here.run("exit 75", SLURM_RESTART_COUNT=str(n)) for n in range(2)] == [-15, 75]
    assert here.run(here.save(5) + "exit 75", SLURM_RESTART_COUNT="7") == -15


def test_a_line_that_a_full_disk_cut_does_not_spoil_the_next(tmp_path: Path) -> None:
    here = machine(tmp_path)
    here.chain()
    (here.job / "attempts").write_text("1 12345 17 start - none\n1 123")
    assert here.run() == 0
    assert [(a.number, a.exit) for a in record.attempts(tmp_path / "run", "train")] == [(1, None), (2, 0)]


def test_a_count_of_failures_that_is_none_counts_as_none(tmp_path: Path) -> None:
    here = machine(tmp_path)
    here.chain()
    for text in ("", "no number", "-1"):
        (here.job / "failures").write_text(text)
        assert here.run("exit 7") == -15 and record.failures(tmp_path / "run", "train") == 1


def test_a_controller_that_is_away_is_asked_again_for_the_requeue(tmp_path: Path) -> None:
    here = machine(tmp_path)
    assert here.run("exit 7", REFUSED_REQUEUES="2") == -15
    assert (len(here.called("scontrol")), here.called("sleep")) == (3, ["5", "20"])
    assert here.run("exit 7", REFUSED_REQUEUES="99") == 7 and "scontrol requeue failed" in log(here, 2)


def test_diverged_is_final_as_bad_input_is(tmp_path: Path) -> None:
    here = machine(tmp_path)
    assert here.run(here.save(3) + "exit 3") == 3 and here.called("scontrol") == []
    assert state(here).detail == "diverged (exit 3); see its log"


def test_the_first_rank_that_torchrun_names_says_why(tmp_path: Path) -> None:
    """Its own status is always 1."""
    words = "E1130 10:00:00.1 77 torch/distributed/elastic/multiprocessing/api.py:1010] failed (exitcode: 2) local_rank: 0 (pid: 9) of binary: x"
    here = machine(tmp_path, more="launcher: torchrun")
    assert here.run(f"echo '{words}'; exit 1") == 2 and here.called("scontrol") == []


def test_ranks_meet_on_a_port_that_is_free(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        job = str(10000 + (taken.getsockname()[1] - 15000) % 10000)
        if 15000 + int(job) % 10000 != taken.getsockname()[1]:  # the system gave one that is no job's
            taken.close()
            job = "12345"
            listener = socket.create_server(("127.0.0.1", 17345), reuse_port=True)
        else:
            listener = taken
        here = machine(tmp_path)
        with listener:
            assert here.run(SLURM_JOB_ID=job) == 0
    port = 15000 + int(job) % 10000
    assert int(str(here.ranks()[0]["environment"]["MASTER_PORT"])) > port  # type: ignore[index]


def test_the_first_node_is_this_one_where_slurm_cannot_list_them(tmp_path: Path) -> None:
    here = machine(tmp_path)
    assert here.run(NO_HOSTNAMES="1", SLURMD_NODENAME="node0") == 0
    assert {rank["environment"]["MASTER_ADDR"] for rank in here.ranks()} == {"node0"}  # type: ignore[index]


def test_what_an_allocations_shell_leaves_behind_does_not_reach_srun(tmp_path: Path) -> None:
    here = machine(tmp_path, '["export SRUN_CPUS_PER_TASK=3"]')
    leaks = {"SRUN_DEBUG": "3", "SLURM_MEM_PER_CPU": "1", "SLURM_MEM_PER_NODE": "1"}
    assert here.run("echo $SRUN_CPUS_PER_TASK >>$CALLS/own", **leaks) == 0
    seen = here.ranks()[0]["environment"]
    assert (seen["SRUN_DEBUG"], seen["SLURM_MEM_PER_CPU"]) == (None, None)  # type: ignore[index]
    assert here.called("own") == ["3"] * 4


def test_told_to_stop_during_setup_no_rank_starts(tmp_path: Path) -> None:
    here = machine(tmp_path, '["kill -TERM $$"]')
    assert here.run() == 143 and here.ranks() == [] and here.called("scontrol") == []
    assert only(here).exit == 143
