"""The pool of ranks itself: what jobs get, what failures look like, and that nothing is left of either."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from pool import JOBS, RankError, RankPool

from elastic_megatron import runtime


def gathered(add: float, *, scale: float = 1.0) -> tuple[int, list[float], torch.Tensor]:
    runtime.start()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    parts = [torch.zeros(1) for _ in range(world)]
    torch.distributed.all_gather(parts, torch.tensor([scale * rank + add]))
    return rank, [float(part) for part in parts], torch.full((2, rank + 1), rank, dtype=torch.float64)


@pytest.mark.parametrize("world", [3, 1, 2])
def test_a_job_returns_what_every_rank_returned_in_order(ranks: RankPool, world: int) -> None:
    results = ranks.run(gathered, world, 0.5, scale=3.0)
    assert [rank for rank, _, _ in results] == [*range(world)]
    assert [values for _, values, _ in results] == [[3.0 * r + 0.5 for r in range(world)]] * world
    for rank, _, tensor in results:
        assert torch.equal(tensor, torch.full((2, rank + 1), rank, dtype=torch.float64))


def surroundings() -> tuple[str | None, str, int, bool]:
    seen = (os.environ.get("OF_THE_TEST"), os.getcwd(), torch.get_num_threads())
    return *seen, torch.cuda.is_available()


def test_ranks_do_several_jobs_before_fresh_ones_take_over(ranks: RankPool) -> None:
    crews = [tuple(ranks.run(os.getpid, 2)) for _ in range(2 * JOBS)]
    changes = [i for i in range(1, len(crews)) if crews[i] != crews[i - 1]]
    assert len(set(crews)) == len(changes) + 1 and changes[0] <= JOBS
    assert all(later - earlier == JOBS for earlier, later in itertools.pairwise(changes))
    assert list(crews[-1]) == ranks.pids[1:3]


def test_jobs_run_on_single_threads_in_the_surroundings_of_the_test(
    ranks: RankPool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, folder = ranks.run(surroundings, 2), str(Path.cwd())
    monkeypatch.setenv("OF_THE_TEST", "yes")
    monkeypatch.chdir(tmp_path)
    second = ranks.run(surroundings, 2)
    assert {*first} == {(None, folder, 1, False)}
    assert {*second} == {("yes", str(tmp_path), 1, False)}


def sizes_of_groups(**sizes: int) -> tuple[bool, int, int, int]:
    left_over = torch.distributed.is_initialized()
    runtime.start(**sizes)
    groups = runtime.groups()
    return left_over, groups.tp.size(), groups.pp.size(), groups.dp.size()


def test_the_groups_of_one_job_are_gone_before_the_next(ranks: RankPool) -> None:
    assert ranks.run(sizes_of_groups, 2, tensor=2) == [(False, 2, 1, 1)] * 2
    assert ranks.run(sizes_of_groups, 3) == [(False, 1, 1, 3)] * 3
    assert ranks.run(sizes_of_groups, 2, pipeline=2) == [(False, 1, 2, 1)] * 2


def fail_on(bad: int, everyone_waits: bool) -> None:
    runtime.start()
    print(f"words of rank {os.environ['RANK']}")
    if int(os.environ["RANK"]) == bad:
        time.sleep(0.0 if everyone_waits else 0.5)  # the others have returned by then
        raise ValueError(f"odd number {bad}")
    if everyone_waits:
        torch.distributed.barrier()


@pytest.mark.parametrize("everyone_waits", [True, False])
def test_an_error_names_the_rank_and_shows_its_traceback_and_words(
    ranks: RankPool, everyone_waits: bool
) -> None:
    with pytest.raises(RankError) as caught:
        ranks.run(fail_on, 3, 1, everyone_waits=everyone_waits)
    said = str(caught.value)
    assert said.startswith("test_pool.fail_on on 3 ranks: rank 1 raised: ValueError: odd number 1\n")
    assert 'raise ValueError(f"odd number {bad}")' in said and "words of rank 1" in said
    others = {outcome.rank: outcome.how for outcome in caught.value.outcomes if outcome.rank != 1}
    assert others.keys() == {0, 2}
    assert ("words of rank 0" in said) == everyone_waits
    if not everyone_waits:
        assert {*others.values()} == {"returned"}
    assert ranks.run(sizes_of_groups, 2) == [(False, 1, 1, 2)] * 2


def not_picklable() -> object:
    return lambda: None


def test_a_result_that_cannot_travel_is_an_error_of_its_rank(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="rank 0 raised: .*pickle"):
        ranks.run(not_picklable, 1)


SLEEP = 300.0


def sleep_on(bad: int) -> None:
    if int(os.environ["RANK"]) == bad:
        time.sleep(SLEEP)


def test_a_hang_ends_at_its_timeout_and_shows_where_it_was(ranks: RankPool) -> None:
    before, started = ranks.pids, time.monotonic()
    with pytest.raises(RankError) as caught:
        ranks.run(sleep_on, 2, 1, timeout=3.0)
    assert 3.0 <= time.monotonic() - started < SLEEP
    said = str(caught.value)
    assert said.startswith("test_pool.sleep_on on 2 ranks: rank 1 hung: after 3 s\n")
    assert "in sleep_on" in said and "rank 0" not in said
    assert ranks.run(sizes_of_groups, 2) == [(False, 1, 1, 2)] * 2
    assert not {*before[1:]} & {*ranks.pids}


def die(number: int, bad: int) -> None:
    runtime.start()
    if int(os.environ["RANK"]) == bad:
        os.kill(os.getpid(), number)
    torch.distributed.barrier()


def test_a_rank_that_dies_is_named_and_shows_where_it_was(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="^test_pool.die on 3 ranks: rank 2 died: SIGSEGV\n") as caught:
        ranks.run(die, 3, int(signal.SIGSEGV), 2)
    assert "in die" in str(caught.value)
    assert ranks.run(sizes_of_groups, 3) == [(False, 1, 1, 3)] * 3


def test_a_death_is_told_before_the_errors_that_it_caused(ranks: RankPool) -> None:
    job = ranks.start(die, 3, int(signal.SIGKILL), 2)
    time.sleep(3.0)  # until all of them have ended
    assert str(job.wait()[0]) == "rank 2 died: SIGKILL"


def fork_and_write(folder: str) -> None:
    """A process beside the rank, as for an asynchronous save, that outlives it if nobody cares."""
    rank = os.environ["RANK"]
    if child := os.fork():
        Path(folder, f"child{rank}").write_text(str(child))
    while True:
        time.sleep(0.01)


def children_of(folder: Path, world: int) -> list[int]:
    """Process numbers that ``fork_and_write`` wrote, once they are all there."""
    files = [folder / f"child{rank}" for rank in range(world)]
    until = time.monotonic() + 30.0
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < until
        time.sleep(0.01)
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize("victims", [(), (1,)])
def test_a_job_can_be_killed_from_outside_with_all_that_it_started(
    ranks: RankPool, tmp_path: Path, victims: tuple[int, ...]
) -> None:
    job = ranks.start(fork_and_write, 2, str(tmp_path))
    children = children_of(tmp_path, 2)
    processes = ranks.pids[1:]
    job.kill(*victims)
    outcomes = {outcome.rank: (outcome.how, outcome.error) for outcome in job.wait()}
    assert outcomes[1] == ("died", "SIGKILL")
    assert outcomes[0] == (("stopped", "since another rank had failed") if victims else ("died", "SIGKILL"))
    assert are_gone_soon([*processes, *children])


def test_a_job_that_nobody_waited_for_is_killed_by_the_next(ranks: RankPool, tmp_path: Path) -> None:
    ranks.start(fork_and_write, 2, str(tmp_path))
    children = children_of(tmp_path, 2)
    assert ranks.run(sizes_of_groups, 2) == [(False, 1, 1, 2)] * 2
    assert not [pid for pid in children if is_running(pid)]


def test_a_pool_refuses_more_ranks_than_it_has_and_starts_nothing_for_that() -> None:
    with RankPool(2) as pool:
        with pytest.raises(ValueError, match="a job on 3 ranks, but the pool has 2"):
            pool.run(sizes_of_groups, 3)
        assert pool.pids == []


ABANDONED = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pool import RankPool
pool = RankPool(2, cuda=True)  # the one that imports nothing first
pool.start(time.sleep, 2, 600)
print(*pool.pids, flush=True)
os.kill(os.getpid(), 9)
"""


def test_ranks_and_logs_go_with_the_process_that_has_the_pool(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ABANDONED, str(Path(__file__).parent)]
    folder = {"TMPDIR": str(tmp_path)}
    done = subprocess.run(command, env=os.environ | folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 3
    assert are_gone_soon(pids) and not [*tmp_path.glob("ranks-*")]


def test_a_pool_whose_importer_was_killed_starts_over() -> None:
    with RankPool(2, cuda=True) as pool:
        importer, *ranks = [pool.run(os.getppid, 1)[0], *pool.run(os.getpid, 2)]
        assert pool.pids == [importer, *ranks]
        os.kill(importer, signal.SIGKILL)
        assert are_gone_soon(ranks)
        with pytest.raises(RankError, match="^the process that imports Megatron for the ranks has ended"):
            pool.run(os.getpid, 2)
        assert not {*pool.run(os.getpid, 2)} & {importer, *ranks}


def test_closing_leaves_no_process_and_a_later_job_starts_new_ones() -> None:
    pool = RankPool(3, cuda=True)
    first, before = pool.run(os.getpid, 1), pool.pids
    assert len(before) == 4
    pool.close()
    assert pool.pids == [] and not [pid for pid in before if is_running(pid)]
    with pool:
        assert pool.run(os.getpid, 1) != first


def are_gone_soon(pids: Sequence[int]) -> bool:
    until = time.monotonic() + 10.0
    while any(is_running(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(is_running(pid) for pid in pids)


def is_running(pid: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def backend_and_device() -> tuple[str, str]:
    started = runtime.start()
    return started.backend, str(torch.ones(1, device=started.device).device)


@pytest.mark.gpu
def test_ranks_that_see_gpus_have_one_each_and_nccl(gpu_ranks: RankPool) -> None:
    expected = [("nccl", f"cuda:{rank}") for rank in range(gpu_ranks.size)]
    assert gpu_ranks.run(backend_and_device, gpu_ranks.size) == expected
