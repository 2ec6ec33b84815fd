"""A curriculum in two jobs is the curriculum in one, and a signal before the first step costs nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_state import assert_same_state, lines

from elastic_megatron.checkpoint.tracker import newest
from elastic_megatron.cli import main
from elastic_megatron.errors import AGAIN, UserError
from elastic_megatron.recipe import Recipe, dump
from elastic_megatron.runtime.launch import run_ranks
from elastic_megatron.training import train as module
from elastic_megatron.training.rank import rank
from elastic_megatron.training.train import train

pytestmark = pytest.mark.usefixtures("megatron")

FIRST, ALL = 4, 6  # steps of the first stage, and of both


@pytest.fixture(scope="module")
def whole(elastic: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Both stages in one job."""
    recipe = elastic(tmp_path_factory.mktemp("whole") / "run")
    train(recipe)
    return recipe


@pytest.fixture(scope="module")
def first(elastic: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The first stage alone; its run folder is for reading."""
    recipe = elastic(tmp_path_factory.mktemp("first") / "run", stop_after="uniform")
    outcome = train(recipe)
    assert (outcome.step, outcome.total_steps, outcome.interrupted) == (FIRST, FIRST, None)
    return recipe


def steps(recipe: Recipe) -> list[dict[str, Any]]:
    return [line for line in lines(recipe.run_dir) if "loss" in line]


def events(recipe: Recipe, kind: str) -> list[int]:
    return [line[kind]["step"] for line in lines(recipe.run_dir) if kind in line]


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Every file that a run writes, but for its resolved recipe."""
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != "recipe.yaml"}


def test_the_first_job_is_the_beginning_of_the_whole_run(first: Recipe, whole: Recipe) -> None:
    """To the last bit, learning rates and temperatures included: schedules run over all stages."""
    assert steps(first) == steps(whole)[:FIRST]
    assert newest(first.run_dir / "checkpoints") == first.run_dir / "checkpoints" / f"iter_{FIRST:07d}"
    assert events(first, "eval") == events(first, "router") == [3, FIRST]
    assert events(whole, "eval") == [3, ALL]


def test_two_jobs_train_what_one_does(elastic: Callable[..., Recipe], whole: Recipe, tmp_path: Path) -> None:
    train(elastic(tmp_path / "run", stop_after="uniform"))
    second = elastic(tmp_path / "run", stop_after=None)
    outcome = train(second)
    assert (outcome.step, outcome.interrupted) == (ALL, None)
    assert steps(second) == steps(whole)
    assert_same_state(second, whole)


def test_saves_by_tokens_come_at_the_same_steps_in_two_jobs(
    elastic: Callable[..., Recipe], whole: Recipe, tmp_path: Path
) -> None:
    """Steps of 128 tokens: 300 and 600 are completed by steps 3 and 5. Warm-up by tokens is that by steps."""
    changes = {
        "checkpoint": {"interval_tokens": 300, "keep_last": 9},
        "optimizer": {"lr": 1e-3, "warmup_tokens": 200},
    }
    train(elastic(tmp_path / "run", stop_after="uniform", **changes))
    second = elastic(tmp_path / "run", **changes)
    train(second)
    saved = sorted(int(p.name[5:]) for p in (tmp_path / "run/checkpoints").glob("iter_*"))
    assert saved == [3, FIRST, 5, ALL]
    assert steps(second) == steps(whole)


def test_the_last_stage_may_be_named_too(elastic: Callable[..., Recipe], tmp_path: Path) -> None:
    assert elastic(tmp_path / "run", stop_after="weighted").last_step == ALL


def test_a_complete_job_is_left_alone(first: Recipe, whole: Recipe, elastic: Callable[..., Recipe]) -> None:
    """Only the resolved recipe is written: neither the same job, nor an earlier one of a run that went on, trains."""
    earlier = elastic(whole.run_dir, stop_after="uniform")
    for recipe in (first, whole, earlier):
        before = snapshot(recipe.run_dir)
        outcome = train(recipe)
        assert (outcome.step, outcome.interrupted, outcome.main) == (recipe.last_step, None, True)
        assert snapshot(recipe.run_dir) == before


def test_a_signal_during_the_last_step_of_a_job_changes_nothing(
    elastic: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, one_step = elastic(tmp_path / "run", stop_after="uniform"), module._Run._one_step

    def signalled(self: Any, step: int, lr: float) -> Any:
        if step == FIRST - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return one_step(self, step, lr)

    monkeypatch.setattr(module._Run, "_one_step", signalled)
    outcome = train(recipe)
    assert (outcome.step, outcome.interrupted) == (FIRST, None)


def file_of(recipe: Recipe) -> str:
    path = recipe.run_dir.with_suffix(".resolved.yaml")
    path.write_text(dump(recipe))
    return str(path)


def status(*arguments: str) -> int | str | None:
    try:
        return main(arguments)
    except SystemExit as e:
        return e.code


@pytest.mark.parametrize("moment", ["check_train", "parent_source", "start"])
def test_usr1_while_a_job_sets_up_leaves_at_once(
    elastic: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    recipe, handler = elastic(tmp_path / "run"), signal.getsignal(signal.SIGUSR1)

    def signalled(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        pytest.fail("went on")

    monkeypatch.setattr(module, moment, signalled)
    assert status("train", file_of(recipe)) == AGAIN == 75
    assert not recipe.run_dir.exists() and signal.getsignal(signal.SIGUSR1) is handler


def test_a_signal_while_ranks_build_stops_them_before_the_first_step(
    first: Recipe,
    whole: Recipe,
    elastic: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They have been joined, so that none may leave alone; what was saved before stays the newest."""
    shutil.copytree(first.run_dir, tmp_path / "run")
    recipe, build = elastic(tmp_path / "run", stop_after=None), module.build_student

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return build(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "build_student", signalled)
        assert status("train", file_of(recipe)) == AGAIN
    assert "SIGUSR1: stopped before the first step" in capsys.readouterr().err.replace("\n", " ")
    assert [p.name for p in sorted((recipe.run_dir / "checkpoints").glob("iter_*"))] == [
        "iter_0000003",
        f"iter_{FIRST:07d}",
    ]
    assert train(recipe).step == ALL
    assert_same_state(recipe, whole)


IMPORTING = """
import builtins, os, signal, sys
plain = builtins.__import__
def signalled(name, *rest):
    if name == "torch":
        os.kill(os.getpid(), signal.SIGUSR1)
        raise AssertionError("went on")
    return plain(name, *rest)
builtins.__import__ = signalled
from elastic_megatron.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""


def test_usr1_while_torch_is_imported_is_no_crash(elastic: Callable[..., Recipe], tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", IMPORTING, file_of(elastic(tmp_path / "run"))],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (AGAIN, "", "")


ONE_OF_TWO = """
import os, signal, sys
from elastic_megatron.cli import main
from elastic_megatron.training import train as module
build = module.build_student
def signalled(*arguments):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)
    return build(*arguments)
module.build_student = signalled
try:
    status = main(["train", sys.argv[1]])
except SystemExit as e:
    status = e.code
open(f"{sys.argv[2]}.{os.environ['RANK']}", "w").write(str(status))
"""


def test_ranks_leave_together_where_one_is_signalled(
    elastic: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = elastic(tmp_path / "run", stop_after="uniform")
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):  # then keep it here, for this and other tests' processes
        monkeypatch.delenv("PYTHONDONTWRITEBYTECODE")
        monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path.parent / "bytecode"))
    assert run_ranks([sys.executable, "-c", ONE_OF_TWO, file_of(recipe), str(tmp_path / "status")], 2) == 0
    assert [(tmp_path / f"status.{r}").read_text() for r in range(2)] == [str(AGAIN)] * 2
    assert not (recipe.run_dir / "checkpoints").exists()


def test_rank_refuses_recipes_that_quantise(elastic: Callable[..., Recipe], tmp_path: Path) -> None:
    """Sorting comes first: blocks of columns that share a scale are cut along the stored order."""
    recipe = elastic(tmp_path / "run", quantize={"format": "nvfp4"})
    with pytest.raises(UserError, match=r"sort first and quantise then: set quantize=null$"):
        rank(recipe)
    assert not recipe.run_dir.exists()
