"""Signals and data-parallel ranks leave the run what it would have been."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from cli_story import Story, done, metrics, run, tensors

from elastic_megatron.errors import AGAIN
from elastic_megatron.runtime.launch import run_ranks
from elastic_megatron.training.log import RunLog


def _timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "step_ms"} for line in lines]


@pytest.fixture
def signal_after(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Send this process a signal, once, when the log of a run gets the line of a step."""

    def arrange(number: signal.Signals, step: int) -> None:
        write = RunLog.step

        def step_then_signal(self: RunLog, line: Mapping[str, Any]) -> None:
            write(self, line)
            if line["step"] == step:
                monkeypatch.setattr(RunLog, "step", write)
                os.kill(os.getpid(), number)

        monkeypatch.setattr(RunLog, "step", step_then_signal)

    return arrange


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, AGAIN), (signal.SIGINT, 130)]
)
def test_interrupted_run_goes_on_as_if_nothing_had_happened(
    story: Story, tmp_path: Path, signal_after: Any, number: signal.Signals, status: int
) -> None:
    """Interrupted between two checkpoints, at a step of the first stage; the second run crosses into the next."""
    signal_after(number, 5)
    command = ["train", story.recipe("elastic"), f"run_dir={tmp_path / 'run'}"]
    stopped = run(*command)
    assert stopped.status == status
    assert f"{number.name}: saved step 6; run the same command to continue" in stopped.err.replace("\n", " ")
    assert "Traceback" not in stopped.err and stopped.out == ""
    tracker = tmp_path / "run/checkpoints/latest_checkpointed_iteration.txt"
    assert tracker.read_text().strip() == "6"
    assert [line["step"] for line in metrics(tmp_path / "run") if "step" in line] == list(range(1, 7))

    done(*command)
    resumed, whole = _timeless(metrics(tmp_path / "run")), _timeless(metrics(story.elastic))
    assert [line for line in resumed if line in whole] == whole
    assert all(next(iter(line.values()))["step"] == 6 for line in resumed if line not in whole)
    done("export", tmp_path / "run", tmp_path / "hf", "--elastic")
    ours, theirs = tensors(tmp_path / "hf"), tensors(story.root / "elastic_hf")
    assert ours.keys() == theirs.keys() and all(ours[n].equal(theirs[n]) for n in ours)


def test_killed_run_goes_on_from_its_last_checkpoint(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill leaves: lines of steps that no checkpoint has, the last of them cut short."""
    write = RunLog.step

    def die(self: RunLog, line: Mapping[str, Any]) -> None:
        write(self, line)
        if line["step"] == 7:
            self.file.write('{"step": 8, "los')
            raise RuntimeError("killed")

    command = ["train", story.recipe("elastic"), f"run_dir={tmp_path / 'run'}"]
    monkeypatch.setattr(RunLog, "step", die)
    assert run(*command).status == 1
    monkeypatch.setattr(RunLog, "step", write)
    done(*command)
    assert _timeless(metrics(tmp_path / "run")) == _timeless(metrics(story.elastic))


def test_two_data_parallel_ranks_train_what_one_does(
    story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the full budget nothing is drawn per rank, so that the losses must be equal up to the order of sums."""
    before = set(psutil.Process().children(recursive=True))
    sizes = "tokens: 3072, seq_length: 64, global_batch_size: 8, micro_batch_size: 2"
    stage = f"{{name: a, {sizes}, budget_probs: {{large: 1.0}}}}"
    changes = [f"stages=[{stage}]", "loss.ce_weight=0.5", "checkpoint.interval=0", "log.eval_interval=0"]
    command = ["train", str(story.recipe("elastic")), *changes]
    done(*command, f"run_dir={tmp_path / 'one'}")
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):  # then keep it here, for this and other tests' processes
        monkeypatch.delenv("PYTHONDONTWRITEBYTECODE")
        monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path.parent / "bytecode"))
    ranks = [sys.executable, "-m", "elastic_megatron.cli", *command, f"run_dir={tmp_path / 'two'}"]
    assert run_ranks(ranks, 2) == 0
    one, two = (
        [line for line in metrics(tmp_path / n) if "step" in line or "eval" in line] for n in ("one", "two")
    )
    assert [line.get("step") for line in one] == [line.get("step") for line in two] == [*range(1, 7), None]
    for a, b in zip(one[:-1], two[:-1], strict=True):
        assert {k: b[k] for k in ("loss", "kd_loss", "grad_norm")} == pytest.approx(
            {k: a[k] for k in ("loss", "kd_loss", "grad_norm")}, rel=1e-5, abs=1e-9
        )
        assert (a["tokens"], a["lr"]) == (b["tokens"], b["lr"])
        assert (a["budget"], b["budget"]) == ("large", "large")
    assert one[0]["loss"] > 1
    for name, result in one[-1]["eval"]["submodels"].items():
        assert two[-1]["eval"]["submodels"][name] == pytest.approx(result, rel=1e-4)
    losses = [
        done("eval", tmp_path / n, "--text", story.text, "--submodel", "large", "--json").json["submodels"][
            "large"
        ]
        for n in ("one", "two")
    ]
    assert losses[0].pop("weights") == losses[1].pop("weights") == "fp32"
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (
        json.loads((tmp_path / "two/checkpoints/iter_0000006/elastic.json").read_text())["format_version"]
        == 1
    )
    assert set(psutil.Process().children(recursive=True)) <= before
