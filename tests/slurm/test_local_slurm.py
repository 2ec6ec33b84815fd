"""The test cluster keeps its own promises; the tests of the launcher rest on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from local_slurm import LocalSlurm, missing, wait_until

needs_slurm = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def gone(processes: list[psutil.Process]) -> bool:
    """All ended; a zombie that nobody has reaped yet counts."""
    return not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_all_nodes_are_idle(slurm: LocalSlurm) -> None:
    assert slurm.states() == dict.fromkeys(slurm.nodes, "idle")


def test_a_step_runs_on_two_nodes_whose_names_resolve(slurm: LocalSlurm) -> None:
    show = 'getent ahostsv4 "$SLURMD_NODENAME" | head -1 | cut -d" " -f1'
    assert sorted(slurm.run("srun", "-N2", "bash", "-c", show).split()) == slurm.nodes[:2]


def test_tasks_are_told_rank_and_world_size(slurm: LocalSlurm) -> None:
    said = slurm.run(
        "srun",
        "-N2",
        "--ntasks-per-node=2",
        "bash",
        "-c",
        "echo $SLURM_PROCID of $SLURM_NTASKS at $SLURM_LOCALID",
    )
    assert sorted(said.splitlines()) == ["0 of 4 at 0", "1 of 4 at 1", "2 of 4 at 0", "3 of 4 at 1"]


def test_the_tests_own_environment_names_no_cluster(slurm: LocalSlurm) -> None:
    assert "SLURM_CONF" not in os.environ and Path(slurm.env["SLURM_CONF"]).is_file()


def test_a_requeued_job_starts_again_soon_and_appends(slurm: LocalSlurm) -> None:
    # the first attempt puts itself back into the queue
    job = slurm.sbatch(
        "echo attempt ${SLURM_RESTART_COUNT:-0}\n"
        "[[ ${SLURM_RESTART_COUNT:-0} = 0 ]] || exit 0\n"
        "scontrol requeue $SLURM_JOB_ID; sleep 30",
        *("--requeue", "--open-mode=append", "--gpus-per-node=8"),
    )
    started = time.monotonic()
    assert slurm.wait_for(job, "COMPLETED")["Restarts"] == "1"
    # Slurm's own number: without cred_expire in the configuration a requeue waits these two minutes
    assert time.monotonic() - started < 120
    said = (slurm.folder / f"slurm-{job}.out").read_text().splitlines()
    assert [line for line in said if line.startswith("attempt")] == ["attempt 0", "attempt 1"]


def test_a_killed_node_takes_its_tasks_along_and_comes_back(slurm: LocalSlurm) -> None:
    first, second = slurm.nodes[2:]
    # setsid: a task that leaves its session is found as well
    task = "srun bash -c 'setsid sleep 77 & sleep 77'"
    job = slurm.sbatch(task, "-N2", f"--nodelist={first},{second}", "--requeue")

    def sleeping() -> int:
        return sum(p.name() == "sleep" for p in slurm.processes())

    try:
        wait_until(lambda: sleeping() == 4, "two tasks on either node")
        slurm.kill_node(second)
        wait_until(lambda: sleeping() == 2, "those of one node are gone")
        assert slurm.reachable(first) and not slurm.reachable(second)
        slurm.start_node(second)
        assert slurm.run("srun", f"--nodelist={second}", "printenv", "SLURMD_NODENAME").strip() == second
        assert slurm.job(job)["Restarts"] == "1", "the job was on a lost node"
    finally:
        slurm.reset()
    assert slurm.job(job)["JobState"] == "CANCELLED"


@needs_slurm
def test_nothing_is_left_after_stop() -> None:
    with LocalSlurm(nodes=1) as cluster:
        job = cluster.sbatch("setsid -f sleep 78; srun sleep 78")
        wait_until(lambda: sum(p.name() == "sleep" for p in cluster.processes()) == 2, "the job runs")
        assert cluster.job(job)["JobState"] == "RUNNING"
        running = cluster.processes()
        assert {"munged", "slurmctld", "slurmd", "slurmstepd"} <= {p.name() for p in running}
    assert gone(running)
    assert not cluster.folder.exists()


@needs_slurm
def test_nothing_is_left_when_the_tests_are_killed() -> None:
    program = (
        "import sys; from local_slurm import LocalSlurm\n"
        "with LocalSlurm(nodes=1) as cluster:\n"
        "    print(cluster.folder, *(p.pid for p in cluster.processes()), flush=True); sys.stdin.read()"
    )
    session = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert session.stdout
    folder, *pids = session.stdout.readline().split()
    daemons = [psutil.Process(int(pid)) for pid in pids]
    assert len(daemons) >= 3 and not gone(daemons[:1])
    session.send_signal(signal.SIGKILL)
    session.communicate(timeout=10)
    wait_until(lambda: gone(daemons) and not Path(folder).exists(), "the cluster has ended", timeout=10)


def test_two_clusters_run_side_by_side(slurm: LocalSlurm) -> None:
    with LocalSlurm(nodes=1) as other:
        assert not set(other.nodes) & set(slurm.nodes)
        assert other.run("srun", "printenv", "SLURMD_NODENAME").strip() == other.nodes[0]
        assert slurm.run("srun", "printenv", "SLURMD_NODENAME").strip() in slurm.nodes
        ids = [cluster.sbatch("true", "--hold") for cluster in (slurm, other)]
        assert abs(ids[0] - ids[1]) > 50, "jobs derive their ports from their ids"
    slurm.reset()


def test_container_options_reach_batch_script_and_tasks(slurm_with_pyxis: LocalSlurm, tmp_path: Path) -> None:
    srun = "srun -N2 --container-image=nvcr.io#nvidia/pytorch:26.01-py3 --container-mounts=/a:/a,/b:/b --container-writable"
    job = slurm_with_pyxis.sbatch(f"{srun} bash -c 'env | grep PYXIS_STUB_'", "-N2", cwd=tmp_path)
    slurm_with_pyxis.wait_for(job, "COMPLETED")
    said = (tmp_path / f"slurm-{job}.out").read_text().splitlines()
    assert sorted(said) == sorted(
        2
        * [
            "PYXIS_STUB_CONTAINER_IMAGE=nvcr.io#nvidia/pytorch:26.01-py3",
            "PYXIS_STUB_CONTAINER_MOUNTS=/a:/a,/b:/b",
            "PYXIS_STUB_CONTAINER_WRITABLE=1",
        ]
    )


def test_container_options_are_refused_without_pyxis(slurm: LocalSlurm) -> None:
    with pytest.raises(AssertionError, match="unrecognized option '--container-image=x'"):
        slurm.run("srun", "--container-image=x", "true")
