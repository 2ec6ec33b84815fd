"""What becomes of jobs on a real Slurm: success, failure, signals, cancellation. Their ranks train nothing."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chains import TRACKER, Chain, fake_chain
from local_slurm import LocalSlurm, wait_until

FOUR = range(4)

# scenario -> plans of its jobs, continuation of the first, lines of the cluster file
SCENARIOS = {
    "torchrun": ({"first": ["wait", "finish"]}, "{kind: requeue}", "launcher: torchrun"),
    "crashing": ({"first": ["exit-7"], "second": ["finish"]}, "{kind: requeue, max_failures: 2}", ""),
    "advancing": ({"first": ["advance-7", "finish"]}, "{kind: requeue, max_failures: 1}", ""),
    "bad input": ({"first": ["exit-2"], "second": ["finish"]}, "{kind: requeue}", ""),
    "once": ({"first": ["exit-7"]}, "{kind: none}", ""),
    "signalled": ({"first": ["wait", "finish"], "second": ["finish"]}, "{kind: requeue}", ""),
    "killed": ({"first": ["wait", "finish"]}, "{kind: requeue}", ""),
    "links": ({"first": ["wait", "wait", "finish"], "second": ["finish"]}, "{kind: chain, links: 4}", ""),
}  # fmt: skip


@dataclass
class Observed:
    """What the commands said about the scenario "signalled" while it lived."""

    followed: subprocess.Popen[str]
    running: dict[str, dict[str, Any]]
    logs: list[str]
    requeued: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def chains(slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Chain]]:
    """All scenarios at once: a requeued job waits eleven seconds, which they do together.

    Two are signalled as soon as their ranks can take it. The run folders have a blank in their names.
    """
    made: dict[str, Chain] = {}
    for name, (plans, continuation, cluster) in SCENARIOS.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
        made[name] = fake_chain(
            slurm, folder, plans, continuation=continuation, cluster=cluster, run_dir="the run"
        )
        made[name].submit()
    os.kill(made["killed"].wait_until_waiting("first")[2], signal.SIGKILL)
    for name in ("links", "torchrun"):
        made[name].wait_until_waiting("first")
        made[name].send_usr1("first")
    yield made
    slurm.reset()


@pytest.fixture(scope="module")
def observed(chains: dict[str, Chain]) -> Iterator[Observed]:
    """Signals the scenario "signalled", and looks at it before and after."""
    chain = chains["signalled"]
    command = chain.command("logs", "first", "--follow")
    followed = subprocess.Popen(command, env=chain.slurm.env, stdout=subprocess.PIPE, text=True)
    try:
        chain.wait_until_waiting("first")
        running = chain.states()
        logs = [
            chain.run("logs"),
            chain.run("logs", "first", "-n", "1"),
            chain.run("logs", "second", status=2),
        ]
        chain.send_usr1("first")
        wait_until(lambda: chain.slurm.job(chain.ids("first")[0])["JobState"] == "PENDING", "requeued")
        yield Observed(followed, running, logs, chain.states())
    finally:
        followed.kill()
        followed.communicate()


def test_a_crash_loop_stops_and_takes_its_children_along(chains: dict[str, Chain]) -> None:
    chain = chains["crashing"]
    first = chain.wait_until_ended("first")
    assert chain.attempts("first") == ["7", "7"], "max_failures: 2"
    assert (first["state"], first["attempt"]) == ("failed", 2) and "exit 7 twice in a row" in first["detail"]
    second = chain.wait_until_ended("second")
    assert (second["state"], second["detail"]) == ("cancelled", "since first did not succeed")
    assert chain.attempts("second") == []
    assert "its log: elastic-megatron logs" in chain.run("status")


def test_bad_input_is_not_tried_again(chains: dict[str, Chain]) -> None:
    chain = chains["bad input"]
    first = chain.wait_until_ended("first")
    assert (first["state"], first["detail"]) == ("failed", "bad input (exit 2)")
    assert chain.attempts("first") == ["2"]
    assert chain.wait_until_ended("second")["state"] == "cancelled"


def test_a_job_without_continuation_runs_once(chains: dict[str, Chain]) -> None:
    assert chains["once"].wait_until_ended("first")["state"] == "failed"
    assert chains["once"].attempts("first") == ["7"]


def test_failures_with_a_newer_checkpoint_do_not_count(chains: dict[str, Chain]) -> None:
    chain = chains["advancing"]
    assert chain.wait_until_ended("first")["state"] == "done"
    assert chain.attempts("first") == ["7", "0"], "max_failures: 1 would have ended it"


def test_usr1_to_the_batch_shell_makes_every_rank_save_and_the_job_go_on(
    chains: dict[str, Chain], observed: Observed
) -> None:
    chain = chains["signalled"]
    assert chain.wait_until_ended("first")["state"] == "done"
    assert chain.signals("first") == [f"1 {rank} USR1" for rank in FOUR]
    assert chain.attempts("first") == ["75", "0"]
    assert [f"rank {rank} starts at step 10" in chain.log("first", 2) for rank in FOUR] == [True] * 4
    assert len(chain.ids("first")) == 1, "the same job, requeued"
    assert chain.wait_until_ended("second")["state"] == "done"


def test_status_and_logs_at_each_stage(chains: dict[str, Chain], observed: Observed) -> None:
    chain, running, waiting = chains["signalled"], observed.running, observed.requeued["first"]
    assert (running["first"]["state"], running["first"]["attempt"]) == ("running", 1)
    assert (running["first"]["step"], running["first"]["steps"]) == (0, 782)
    assert (running["second"]["state"], running["second"]["detail"]) == ("waiting", "for first")
    whole, last_line, none = observed.logs
    assert all(f"rank {rank} starts at step 0" in whole for rank in FOUR)
    assert last_line.count("\n") == 1
    assert "second has not started yet" in none
    assert waiting["state"] == "waiting" and waiting["detail"].startswith("again, after exit 75")
    chain.wait_until_ended("second")
    assert [state["state"] for state in chain.states().values()] == ["done", "done"]
    assert (chain.job("first") / "logs" / "latest").resolve().name == "attempt_2.log"
    assert "rank 0 starts at step 0" in chain.run("logs", "first", "--attempt", "1")
    assert "rank 0 starts at step 10" in chain.run("logs", "first")


def test_logs_are_followed_over_attempts_to_the_end(chains: dict[str, Chain], observed: Observed) -> None:
    said, _ = observed.followed.communicate(timeout=60)
    assert observed.followed.returncode == 0
    expected = [
        "rank 0 starts at step 0",
        "rank 0 saves on USR1",
        "==> attempt_2.log <==",
        "rank 0 starts at step 10",
    ]
    places = [said.find(text) for text in expected]
    assert -1 not in places and places == sorted(places), said
    assert said.count("rank 0 starts at step 0\n") == 1


def test_a_killed_rank_takes_the_others_along_and_the_job_starts_again(chains: dict[str, Chain]) -> None:
    chain = chains["killed"]
    assert chain.wait_until_ended("first")["state"] == "done"
    first, second = chain.attempts("first")
    assert first not in ("", "0", "75") and second == "0"


def test_links_follow_one_another_until_the_work_is_done(chains: dict[str, Chain]) -> None:
    chain = chains["links"]
    chain.wait_until_waiting("first", attempt=2)
    chain.send_usr1("first")
    assert chain.wait_until_ended("first")["state"] == "done"
    assert chain.attempts("first") == ["75", "75", "0"]
    assert chain.signals("first") == [f"{attempt} {rank} USR1" for attempt in (1, 2) for rank in FOUR]
    assert len(chain.ids("first")) == 4, "the last one finds nothing to do"
    assert chain.wait_until_ended("second")["state"] == "done"


def test_torchrun_hands_the_signal_on_and_gives_ranks_their_numbers(chains: dict[str, Chain]) -> None:
    chain = chains["torchrun"]
    assert chain.wait_until_ended("first", timeout=120)["state"] == "done"
    assert chain.signals("first") == [f"1 {rank} USR1" for rank in FOUR]
    assert chain.attempts("first") == ["75", "0"]
    seen = [line.split(",")[0] for line in (chain.job("first") / "ranks").read_text().splitlines()]
    assert sorted(seen) == [f"{attempt} rank {rank} of 4" for attempt in (1, 2) for rank in FOUR]


def test_ranks_know_each_other(chains: dict[str, Chain]) -> None:
    chain = chains["once"]
    chain.wait_until_ended("first")
    job = chain.ids("first")[0]
    lines = sorted((chain.job("first") / "ranks").read_text().splitlines())
    meeting = f"{chain.slurm.nodes[0][:-1]}"
    assert [line.split(f", {meeting}")[0] for line in lines] == [
        f"1 rank {rank} of 4, local {rank % 2}" for rank in FOUR
    ]
    assert {line.split(":")[1] for line in lines} == {f"{15000 + job % 10000}, train from 0"}


def test_scripts_are_the_users_and_resume_sends_them_as_they_stand(chains: dict[str, Chain]) -> None:
    chain = chains["crashing"]
    chain.wait_until_ended("second")
    script = chain.job("first") / "job.sbatch"
    script.write_text(script.read_text().replace("before=", 'echo "edited by hand"\nbefore='))
    (chain.file.parent / "tools" / "plan.first").write_text("finish\n")
    chain.run("resume")
    assert chain.wait_until_ended("first")["state"] == "done"
    assert chain.wait_until_ended("second")["state"] == "done"
    assert chain.attempts("first") == ["7", "7", "0"] and chain.attempts("second") == ["0"]
    assert "edited by hand" in chain.log("first", 3)
    assert "nothing to do" in chain.run("resume")


@pytest.fixture
def chain(slurm: LocalSlurm, tmp_path: Path) -> Iterator[Chain]:
    """Two jobs, of which the first waits for a signal and then finishes."""
    yield fake_chain(slurm, tmp_path, {"first": ["wait", "finish"], "second": ["finish"]})
    slurm.reset()


def test_cancel_lets_ranks_save_and_nothing_starts_again(chain: Chain) -> None:
    chain.submit()
    chain.wait_until_waiting("first")
    assert "cancelled" in chain.run("cancel")
    first = chain.wait_until_ended("first")
    assert (first["state"], first["attempt"]) == ("cancelled", 1)
    assert chain.signals("first") == [f"1 {rank} TERM" for rank in FOUR]
    assert chain.attempts("first") == ["143"]
    assert (chain.file.parent / "work" / "first" / TRACKER).read_text() == "10\n"
    assert chain.wait_until_ended("second")["state"] == "cancelled"
    assert "none of them is in the queue" in chain.run("cancel")
    chain.run("resume")
    assert chain.wait_until_ended("second")["state"] == "done"
    assert chain.attempts("first")[1:] == ["0"]
