"""A run that is interrupted anywhere and started again is the run that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from run_state import assert_same_state, crash_before, lines, state_of
from torch import Tensor

from elastic_megatron.blocks import build_elastic_model
from elastic_megatron.checkpoint import distributed, tracker
from elastic_megatron.checkpoint.manifest import FILE, Manifest
from elastic_megatron.checkpoint.resolve import elastic_space
from elastic_megatron.checkpoint.tracker import TRACKER, newest
from elastic_megatron.errors import UserError
from elastic_megatron.recipe import Recipe
from elastic_megatron.training import train as module
from elastic_megatron.training.build import build_student
from elastic_megatron.training.family import parent_source
from elastic_megatron.training.train import train

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def uninterrupted(elastic: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = elastic(tmp_path_factory.mktemp("straight") / "run")
    outcome = train(recipe)
    assert (outcome.step, outcome.total_steps, outcome.interrupted) == (6, 6, None)
    return recipe


def test_a_run_changes_every_weight_and_logs_every_step(uninterrupted: Recipe, parent: Path) -> None:
    steps = [line for line in lines(uninterrupted.run_dir) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["tokens"] for line in steps] == [128, 256, 384, 512, 640, 768]
    assert not any(line.get("skipped") for line in steps) and len({line["loss"] for line in steps}) == 6
    evals = [line["eval"] for line in lines(uninterrupted.run_dir) if "eval" in line]
    assert [e["step"] for e in evals] == [3, 6] and set(evals[0]["submodels"]) == {"full", "medium", "small"}
    weights, _ = state_of(uninterrupted)
    before = state_of_parent(uninterrupted)
    unchanged = [n for n, t in before.items() if torch.equal(weights[n], t)]
    assert not unchanged


def state_of_parent(recipe: Recipe) -> dict[str, Tensor]:
    source = parent_source(recipe)
    space = elastic_space(recipe, source.manifest)
    assert space is not None
    model = build_elastic_model(space)
    source.fill([model])
    return {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, Tensor)}


def crash_and_resume(recipe: Recipe, crash_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    crash_before(recipe, crash_at, monkeypatch)
    assert newest(recipe.run_dir / "checkpoints") == recipe.run_dir / "checkpoints" / "iter_0000003"
    torch.manual_seed(999)  # nothing may depend on generator states
    assert train(recipe).step == 6


@pytest.mark.parametrize("crash_at", [3, 5])
def test_resuming_is_exact(
    uninterrupted: Recipe,
    elastic: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crash_at: int,
) -> None:
    """Killed after a checkpoint, or two steps later: the same lines and the same bits at the end."""
    recipe = elastic(tmp_path / "run")
    crash_and_resume(recipe, crash_at, monkeypatch)
    assert lines(recipe.run_dir) == lines(uninterrupted.run_dir)
    assert_same_state(recipe, uninterrupted)


@pytest.mark.parametrize(
    ("dtype", "parallel"),
    [("bf16", {}), ("fp32", {"distributed_optimizer": False}), ("fp32", {"recompute": "full"})],
    ids=["bf16", "whole optimizer", "recompute"],
)
def test_resuming_is_exact_in_other_settings(
    elastic: Callable[..., Recipe],
    parent: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    parallel: dict[str, Any],
) -> None:
    model = {"dtype": dtype, "checkpoint": str(parent)}
    straight, broken = (
        elastic(tmp_path / name, model=model, parallel=parallel) for name in ("straight", "broken")
    )
    train(straight)
    crash_and_resume(broken, 4, monkeypatch)
    assert lines(broken.run_dir) == lines(straight.run_dir)
    assert_same_state(broken, straight)


@pytest.mark.parametrize("said", [0, 1], ids=["nothing said", "router said"])
@pytest.mark.parametrize("step", [3, 6])
def test_a_run_that_was_killed_between_save_and_evaluation_evaluates_when_it_resumes(
    uninterrupted: Recipe,
    elastic: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    said: int,
) -> None:
    """The log is that of the run that was not killed, whichever of the lines after a save were written."""
    recipe = elastic(tmp_path / "run")
    if step == 3:
        crash_before(recipe, 3, monkeypatch)
    else:
        shutil.copytree(uninterrupted.run_dir, recipe.run_dir)
    file = recipe.run_dir / "metrics.jsonl"
    written = file.read_text().splitlines(keepends=True)
    assert ["router" in json.loads(line) or "eval" in json.loads(line) for line in written[-2:]] == [
        True,
        True,
    ]
    file.write_text("".join(written[: len(written) - 2 + said]))
    assert train(recipe).step == 6
    assert lines(recipe.run_dir) == lines(uninterrupted.run_dir)


def test_training_again_after_the_end_does_nothing(
    uninterrupted: Recipe, elastic: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = elastic(tmp_path / "run")
    shutil.copytree(uninterrupted.run_dir, recipe.run_dir)
    before = lines(recipe.run_dir)
    assert train(recipe).step == 6 and lines(recipe.run_dir) == before


class Crash(Exception):
    """Power failure."""


MOMENTS: dict[str, tuple[Any, str]] = {
    "shards": (dist_checkpointing, "save"),
    "manifest": (Manifest, "write"),
    "side files": (shutil, "copy2"),
    "rename": (Path, "rename"),
    "tracker": (tracker, "write_text"),
    "pruning": (tracker, "prune"),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_at_any_moment_of_a_save_leaves_a_loadable_checkpoint(
    uninterrupted: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, after: bool
) -> None:
    root = tmp_path / "checkpoints"
    shutil.copytree(uninterrupted.run_dir / "checkpoints", root)
    source = parent_source(uninterrupted)
    assert source.hf_files is not None
    model = build_student(uninterrupted, source, elastic_space(uninterrupted, source.manifest))
    old = newest(root)
    assert old is not None and old.name == "iter_0000006"
    distributed.load(old, model.chunks, optimizer=model.optimizer)
    manifest = Manifest.read(old / FILE)
    owner, name = MOMENTS[moment]
    original = getattr(owner, name)

    def crash(*args: Any, **kwargs: Any) -> Any:
        if after:
            original(*args, **kwargs)
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, crash)
        with pytest.raises(Crash):
            distributed.save(
                root,
                7,
                model.chunks,
                manifest,
                optimizer=model.optimizer,
                state={"step": 7},
                hf_files=source.hf_files,
                keep_last=1,
            )
    found = newest(root)
    new = moment == "pruning" or (moment == "tracker" and after)
    assert found is not None and found.name == ("iter_0000007" if new else "iter_0000006")
    assert distributed.load(found, model.chunks, optimizer=model.optimizer)["step"] == (7 if new else 6)
    # and the next save succeeds over the remains
    distributed.save(
        root,
        7,
        model.chunks,
        manifest,
        optimizer=model.optimizer,
        state={"step": 7},
        hf_files=source.hf_files,
        keep_last=1,
    )
    assert [p.name for p in sorted(root.glob("iter_*"))] == ["iter_0000007"]
    assert not list(root.glob(".iter_*"))
    assert distributed.load(root / "iter_0000007", model.chunks)["step"] == 7


def test_only_the_last_checkpoints_are_kept(uninterrupted: Recipe) -> None:
    names = sorted(p.name for p in (uninterrupted.run_dir / "checkpoints").iterdir())
    assert names == ["iter_0000003", "iter_0000006", "latest_checkpointed_iteration.txt"]


def damage_shard(folder: Path) -> None:
    shard = max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])


def remove_shard(folder: Path) -> None:
    next(folder.glob("*.distcp")).unlink()


def remove_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "shard cut short": damage_shard,
    "shard missing": remove_shard,
    "metadata missing": remove_metadata,
    "tracker garbled": lambda folder: (folder.parent / TRACKER).write_text("six\n"),
    "tracker ahead": lambda folder: (folder.parent / TRACKER).write_text("99\n"),
    "manifest garbled": lambda folder: (folder / FILE).write_text("{"),
    "manifest of the future": lambda folder: (folder / FILE).write_text('{"format_version": 99}'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_a_one_line_user_error(
    uninterrupted: Recipe, elastic: Callable[..., Recipe], tmp_path: Path, damage: str
) -> None:
    from elastic_megatron.checkpoint.source import open_source

    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted.run_dir, run_dir)
    DAMAGES[damage](run_dir / "checkpoints" / "iter_0000006")
    with pytest.raises(UserError) as caught:
        if "manifest" in damage:
            open_source(run_dir)
        else:
            train(elastic(run_dir))
    assert "\n" not in str(caught.value) and str(run_dir) in str(caught.value)


SCRIPT = """
import sys
def main():
    from elastic_megatron.recipe import load
    from elastic_megatron.training.train import train
    outcome = train(load(sys.argv[1]))
    print("ended", outcome.step, outcome.interrupted and outcome.interrupted.name, flush=True)
if __name__ == "__main__":
    main()
"""


def test_sigterm_saves_at_the_next_step_and_leaves(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """A process of its own, told to stop somewhere in a run of a thousand steps."""
    stages = [
        {
            "name": "long",
            "tokens": 1000 * 4 * 16,
            "seq_length": 16,
            "global_batch_size": 4,
            "micro_batch_size": 4,
        }
    ]
    run_dir, script = tmp_path / "run", tmp_path / "run.py"
    script.write_text(SCRIPT)
    path = recipe_file(
        run_dir, stages=stages, checkpoint={"interval": 0}, log={"tensorboard": False, "eval_tokens": 16}
    )
    process = subprocess.Popen(
        [sys.executable, str(script), str(path)],
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline, metrics = time.monotonic() + 120, run_dir / "metrics.jsonl"
        while not metrics.exists() or len(steps_so_far(metrics)) < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait(timeout=30)
    assert process.returncode == 0
    words = out.split()
    step = int(words[words.index("ended") + 1])
    assert words[-1] == "SIGTERM" and 2 <= step < 1000
    saved = newest(run_dir / "checkpoints")
    assert saved is not None and saved.name == f"iter_{step:07d}"
    assert steps_so_far(metrics) == list(range(1, step + 1))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT])
def test_a_signal_finishes_the_step_and_the_next_call_goes_on(
    uninterrupted: Recipe,
    elastic: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    recipe, one_step = elastic(tmp_path / "run"), module._Run._one_step
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]

    def interrupted(self: Any, step: int, lr: float) -> Any:
        if step == 3:
            os.kill(os.getpid(), number)
        return one_step(self, step, lr)

    with monkeypatch.context() as patch:
        patch.setattr(module._Run, "_one_step", interrupted)
        outcome = train(recipe)
    assert (outcome.step, outcome.interrupted) == (4, number)
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    assert train(recipe).step == 6
    steps = [line for line in lines(recipe.run_dir) if "loss" in line]
    assert steps == [line for line in lines(uninterrupted.run_dir) if "loss" in line]
    assert_same_state(recipe, uninterrupted)


def steps_so_far(path: Path) -> list[int]:
    """Steps in a file that may be being written to."""
    found = [json.loads(text) for text in path.read_text().splitlines() if text.endswith("}")]
    return [line["step"] for line in found if "loss" in line]
