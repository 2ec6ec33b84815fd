"""Checkpoints between layouts, and under kill -9."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_jobs
import psutil
import pytest
import torch
import training_jobs
from layouts import LAYOUTS, Layout
from megatron.core import dist_checkpointing
from pool import RankPool
from runs import assert_same_losses
from saved_models import whole

from elastic_megatron.checkpoint import integrity, tracker
from elastic_megatron.checkpoint.source import open_stored
from elastic_megatron.conversion import Request, to_hf, to_megatron
from elastic_megatron.errors import AGAIN, BAD_INPUT

pytestmark = pytest.mark.usefixtures("megatron")

SIZES = ("tensor", "sequence", "expert", "expert_tensor", "pipeline", "virtual_pipeline", "context")


def sizes(layout: Layout) -> dict[str, int]:
    return {key: value for key, value in layout.parallel.items() if key in SIZES}


def placed_anew(layout: Layout) -> bool:
    """Whether no layout before it in the list places tensors alike."""
    placed = {"expert_tensor": layout.size("tensor"), **sizes(layout)}
    before = LAYOUTS[: LAYOUTS.index(layout)]
    return all(
        (layout.world, placed) != (other.world, {"expert_tensor": other.size("tensor"), **sizes(other)})
        for other in before
    )


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved by one process, and again a step later."""
    root = tmp_path_factory.mktemp("saved")
    ranks.run(checkpoint_jobs.save, 1, str(root), 1, {})
    ranks.run(checkpoint_jobs.save, 1, str(root), 2, {}, steps=3)
    return root


def different(layout: Layout) -> bool:
    """By how tensors are placed."""
    first = next(other for other in LAYOUTS if (other.world, sizes(other)) == (layout.world, sizes(layout)))
    return layout is first


@pytest.mark.parametrize("layout", filter(placed_anew, LAYOUTS), ids=lambda layout: layout.name)
def test_a_checkpoint_survives_any_layout_bit_by_bit(
    layout: Layout, saved: Path, ranks: RankPool, tmp_path: Path, record: Callable[[str, str], None]
) -> None:
    """From one process to the layout and back: weights, router and optimizer; and the step after loading is its."""
    record(layout.name, "resume")
    source, step_later = whole(saved / "iter_0000001"), whole(saved / "iter_0000002")
    states = ranks.run(
        checkpoint_jobs.copy, layout.world, str(saved / "iter_0000001"), str(tmp_path), 11, sizes(layout)
    )
    ranks.run(checkpoint_jobs.copy, 1, str(tmp_path / "iter_0000011"), str(tmp_path), 21, {})
    assert states == [{"step": 1}] * layout.world
    for iteration, expected in ((11, source), (12, step_later), (21, source), (22, step_later)):
        found = whole(tracker.folder(tmp_path, iteration))
        assert (
            found.keys() == expected.keys()
            and "optimizer.state.exp_avg.budget_router.heads.hidden_size.0.weight"
        )
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (iteration, name)


@pytest.mark.parametrize("layout", filter(placed_anew, LAYOUTS), ids=lambda layout: layout.name)
def test_any_layout_converts_to_the_same_directory_and_loads_from_it(
    layout: Layout, saved: Path, exported: Path, ranks: RankPool, tmp_path: Path
) -> None:
    """Exported from the layout's checkpoint, files are those exported from one process', byte by byte; and imported
    from there, the layout loads the weights of that process."""
    source, checkpoint = str(saved / "iter_0000001"), tmp_path / "layout"
    ranks.run(checkpoint_jobs.copy, layout.world, source, str(checkpoint), 11, sizes(layout))
    to_hf(open_stored(checkpoint / "iter_0000011"), [Request(tmp_path / "hf", elastic=True)], verify=True)
    assert content(tmp_path / "hf") == content(exported / "hf")
    imported = str(exported / "checkpoint/iter_0000000")
    ranks.run(checkpoint_jobs.copy_weights, layout.world, imported, str(tmp_path / "back"), sizes(layout))
    found, expected = whole(tmp_path / "back/iter_0000000"), whole(saved / "iter_0000001")
    names = [name for name in expected if name in found and not name.startswith("budget_router.")]
    assert len(names) > 40 and {*found} - {*names} == {n for n in expected if n.startswith("budget_router.")}
    assert all(torch.equal(found[name], expected[name]) for name in names)


@pytest.fixture(scope="module")
def exported(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Out of one process' checkpoint: a directory, and that imported."""
    root = tmp_path_factory.mktemp("exported")
    to_hf(open_stored(saved / "iter_0000001"), [Request(root / "hf", elastic=True)])
    to_megatron(open_stored(root / "hf"), root / "checkpoint", verify=True)
    return root


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


DRAW = 4  # samples that share a draw: right for all layouts
SAVES = (4, 8, 10)  # of the ten steps of a run
LAYOUT = {layout.name: layout for layout in LAYOUTS} | {"alone": None}
RESUMED = {
    "TP2+SP+ETP1+EP2+PP2": ("alone", "PP2+VPP2", "EP4"),
    "PP2+VPP2": ("alone",),
    "EP4": ("alone",),
    "CP2": ("alone",),
    "DP2+overlap": ("alone",),
    "TP2": ("alone",),
}


@pytest.fixture(scope="module")
def train(write: Callable[..., Path], ranks: RankPool) -> Callable[..., Path]:
    """Train to the end under a layout, from where another run was after some step; returns the run's folder."""

    def run(run_name: str, name: str, moe: bool, source: Path | None = None, step: int = 0) -> Path:
        layout = LAYOUT[name]
        parallel = {"recompute": "full", **(layout.parallel if layout else {})}
        save = {"interval": 4, "keep_last": 3, "async_save": source is not None}
        file = write(run_name, moe, DRAW, parallel, checkpoint=save)
        folder = Path(json.loads(file.read_text())["run_dir"])
        if source is not None:
            shutil.copytree(source, folder)
            (folder / "checkpoints" / tracker.TRACKER).write_text(f"{step}\n")
            for later in SAVES[SAVES.index(step) + 1 :]:
                shutil.rmtree(tracker.folder(folder / "checkpoints", later))
        ranks.run(training_jobs.trained, layout.world if layout else 1, str(file), timeout=240)
        assert [int(p.name[5:]) for p in tracker.complete(folder / "checkpoints")] == [*SAVES]
        return folder

    return run


@pytest.fixture(scope="module")
def straight(train: Callable[..., Path]) -> Callable[[bool], Path]:
    """The run in one process, by model."""
    found: dict[bool, Path] = {}

    def run(moe: bool) -> Path:
        if moe not in found:
            found[moe] = train(f"straight_{moe}", "alone", moe)
        return found[moe]

    return run


def curve(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    return [{key: value for key, value in line.items() if key != "step_ms"} for line in steps]


def assert_close(folder: Path, expected: Path) -> None:
    for mine, theirs in zip(curve(folder), curve(expected), strict=True):
        assert_same_losses(mine, theirs, "lr")
        assert mine["budget"] == theirs["budget"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_changes_layout_on_the_way_is_the_run_in_one_process(
    name: str,
    train: Callable[..., Path],
    straight: Callable[[bool], Path],
    record: Callable[[str, str], None],
) -> None:
    """Four steps in one process, four under the layout, two under others; those two under the same: bit by bit."""
    record(name, "resume")
    layout = LAYOUT[name]
    assert layout is not None
    expected = straight(layout.moe)
    there = train(f"{name}_there", name, layout.moe, expected, 4)
    assert_close(there, expected)
    for other in RESUMED[name]:
        assert_close(train(f"{name}_to_{other}", other, layout.moe, there, 8), expected)
    again = train(f"{name}_again", name, layout.moe, there, 8)
    assert curve(again) == curve(there)
    mine, theirs = (whole(tracker.folder(folder / "checkpoints", 10)) for folder in (again, there))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("odd", [0, 2])
def test_routers_that_differ_between_ranks_are_not_saved(ranks: RankPool, tmp_path: Path, odd: int) -> None:
    told = ranks.run(checkpoint_jobs.save_different_routers, 4, str(tmp_path), {"pipeline": 2}, odd)
    assert len({*told}) == 1 and not list(tmp_path.iterdir())
    others = [1, 2, 3] if odd == 0 else [2]
    assert told[0].startswith(f"the budget router of ranks {others} differs from that of rank 0")


@pytest.mark.parametrize("name", ["__1_0.distcp", "elastic.json"])
def test_all_ranks_hear_of_the_file_that_one_of_them_found_damaged(
    ranks: RankPool, tmp_path: Path, name: str
) -> None:
    ranks.run(checkpoint_jobs.save, 2, str(tmp_path), 1, {})
    file = tmp_path / "iter_0000001" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    told = ranks.run(checkpoint_jobs.load, 2, str(file.parent), {})
    assert len({*told}) == 1 and told[0].startswith(f"{file} is damaged") and "\n" not in told[0]


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_all_ranks_hear_of_a_disk_that_is_full_for_one(
    ranks: RankPool, tmp_path: Path, async_save: bool
) -> None:
    """And leave with the status of what may succeed later; the checkpoint before stays whole and named."""
    told = ranks.run(checkpoint_jobs.save_on_full_disk, 2, str(tmp_path), 1, async_save)
    assert all("cannot be written" in line and "\n" not in line for line in told), told
    assert all(line.startswith(f"{AGAIN}: ") for line in told), told
    named = tracker.newest(tmp_path)
    assert named == tmp_path / "iter_0000001" and whole(named)


@pytest.mark.parametrize(("number", "status"), [(errno.ESTALE, AGAIN), (errno.EACCES, BAD_INPUT)])
def test_all_ranks_leave_with_the_status_of_what_was_refused_one(
    ranks: RankPool, tmp_path: Path, number: int, status: int
) -> None:
    told = ranks.run(checkpoint_jobs.save_refused, 2, str(tmp_path), number)
    assert len({*told}) == 1 and told[0].startswith(f"{status}: ") and os.strerror(number) in told[0], told
    named = tracker.newest(tmp_path)
    assert named == tmp_path / "iter_0000001" and whole(named)


def test_a_writer_in_the_background_dies_with_its_rank(ranks: RankPool, tmp_path: Path) -> None:
    """Else it would go on writing while the run that was started again writes the same checkpoint."""
    alive = tmp_path / "alive"
    job = ranks.start(checkpoint_jobs.save_slowly, 1, str(tmp_path / "checkpoints"), str(alive))
    wait_until(alive.exists)
    kill(ranks.pids[1])
    assert [outcome.how for outcome in job.wait()] == ["died"]


KILLS = 24


def test_kill_9_in_a_save_never_costs_a_checkpoint(ranks: RankPool, tmp_path: Path) -> None:
    """Some rank or all, at some moment, saving in the foreground or the background; one root for all attempts."""
    seed = int.from_bytes(os.urandom(3))  # others have seeded random
    print(f"seed {seed}")
    rng, root, pace, last, caught = random.Random(seed), tmp_path / "checkpoints", 1.0, 0, 0
    for attempt in range(KILLS):
        world, async_save, alive = rng.choice([1, 2]), rng.random() < 0.6, tmp_path / f"alive{attempt}"
        alive.mkdir()
        job = ranks.start(checkpoint_jobs.save_without_end, world, str(root), str(alive), async_save)
        wait_until(lambda folder, there: len(list(folder.iterdir())) == there, alive, world)
        began, more = time.monotonic(), rng.randint(0, 2)
        for _ in range(more):
            wait_until(lambda folder, before: named_in(folder) != before, root, named_in(root))
        pace = (time.monotonic() - began) / more if more else pace
        time.sleep(
            rng.uniform(0.0, 2 * pace)
        )  # the same iteration is saved twice, and the tracker shows it once
        for rank in rng.sample(range(world), rng.randint(1, world)):
            kill(ranks.pids[1 + rank])
        outcomes = job.wait(timeout=30)
        assert "died" in {outcome.how for outcome in outcomes}, [(o.error, o.detail) for o in outcomes]
        caught += any(root.glob(".iter_*"))
        last = count_of(root, at_least=last)
    assert last > KILLS and caught > KILLS / 4, (last, caught)


def named_in(root: Path) -> str:
    file = root / tracker.TRACKER
    return file.read_text() if file.exists() else ""


def wait_until(done: Callable[..., bool], *arguments: object) -> None:
    until = time.monotonic() + 60.0
    while not done(*arguments):
        assert time.monotonic() < until
        time.sleep(0.01)


def kill(pid: int) -> None:
    """One process; what it has forked must notice by itself."""
    forked = psutil.Process(pid).children(recursive=True)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, forked)))


def is_running(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def count_of(root: Path, at_least: int) -> int:
    """The save that the root names now: whole, and nothing in it is of another save."""
    named = tracker.newest(root)
    if named is None:
        assert at_least == 0
        return 0
    integrity.verify(named)
    count = dist_checkpointing.load_common_state_dict(str(named))["state"]["count"]
    assert count >= at_least and named.name.startswith((f"iter_{count // 2:07d}", f".iter_{count // 2:07d}"))
    for name, tensor in whole(named).items():
        assert (tensor == count).all(), (count, name, tensor)
    return count
