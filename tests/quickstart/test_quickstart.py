"""The quickstart leaves what it promises, goes on where it was, and leaves no process behind."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from quickstart_calls import Quickstart

SUBMODELS = ("large", "medium", "small")
PHASES = ("data", "parent", "rank", "train", "parent_hf", "elastic_hf", "slices", "evaluate")


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_interruption_saves_and_leaves_nothing_running(played: Quickstart) -> None:
    call = played.calls["interrupted"]
    assert (call.status, call.left) == (130, []), call.err
    assert "Traceback" not in call.err
    assert call.err.splitlines()[-1] == "interrupted"


def test_the_second_call_goes_on_where_the_first_was(played: Quickstart) -> None:
    call = played.calls["finished"]
    assert (call.status, call.left) == (0, []), call.err
    assert "1/8 tokenising the text into bytes: done before" in call.err
    assert "2/8 training a parent model, pattern MEM*E-" in call.err
    steps = [line for line in _metrics(played.out / "work" / "parent") if "step" in line]
    assert [line["step"] for line in steps] == list(range(1, 31))
    # not trained again, or their times would differ
    saved = (played.root / "metrics_interrupted").read_text()
    assert saved and (played.out / "work" / "parent" / "metrics.jsonl").read_text().startswith(saved)
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]


def test_every_promised_file_is_there(played: Quickstart) -> None:
    out = played.out
    for directory in ("parent_hf", "elastic_hf", *(f"slices/{n}" for n in SUBMODELS)):
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            assert (out / directory / name).is_file(), f"{directory}/{name}"
    assert [p.name for p in out.rglob("elastic_config.json")] == ["elastic_config.json"]
    assert (out / "elastic_hf" / "elastic_config.json").is_file()
    for name in (
        "recipe.yaml", "metrics.jsonl", "report.json", "report.html", "ranking.safetensors", "ranking.json",
        "checkpoints/latest_checkpointed_iteration.txt", "checkpoints/iter_0000006/elastic.json",
    ):  # fmt: skip
        assert (out / "run" / name).is_file(), name
    assert (out / "report.html").read_text().lstrip().lower().startswith("<!doctype html")
    assert not [p for p in out.rglob("*") if "incomplete" in p.name]


def test_the_report_tells_the_whole_family(played: Quickstart) -> None:
    report = json.loads((played.out / "report.json").read_text())
    assert {
        "name",
        "created",
        "command",
        "seed",
        "versions",
        "machine",
        "parent",
        "submodels",
        "phases",
        "data",
    } <= set(report)
    assert [phase["name"] for phase in report["phases"]] == list(PHASES)
    assert set(report["submodels"]) == set(SUBMODELS)
    elastic = json.loads((played.out / "elastic_hf" / "elastic_config.json").read_text())
    for name, found in report["submodels"].items():
        assert {
            "budget", "widths", "total_params", "active_params", "flops_per_token", "weights_bytes",
            "loss_unsorted_slice", "loss_sorted_slice", "loss_trained", "gap_closed", "target_cost",
            "realised_cost", "cost_error", "logits_error", "sample",
        } <= set(found)  # fmt: skip
        assert found["widths"] == elastic["submodels"][name]
        assert found["logits_error"] < 2e-6
        assert found["sample"]
    large, parent = report["submodels"]["large"], report["parent"]
    assert large["total_params"] == parent["total_params"] and large["gap_closed"] is None
    assert large["loss_unsorted_slice"] == pytest.approx(parent["loss"], rel=1e-6)
    assert large["loss_sorted_slice"] == pytest.approx(parent["loss"], rel=1e-5)
    evals = [line["eval"] for line in _metrics(played.out / "run") if "eval" in line]
    assert set(evals[-1]["submodels"]) == set(SUBMODELS)


def test_json_is_all_that_stdout_gets(played: Quickstart) -> None:
    """Though the training ranks are processes of their own, with a line to say."""
    call = played.calls["finished"]
    assert call.out.count("\n") == 1
    assert json.loads(call.out)["submodels"].keys() == set(SUBMODELS)
    assert played.calls["interrupted"].out == ""


def test_another_call_does_no_phase_again(played: Quickstart) -> None:
    call = played.calls["again"]
    assert (call.status, call.left) == (0, []), call.err
    assert call.err.count(": done before (") == len(PHASES)
    before, after = json.loads(played.calls["finished"].out), json.loads(call.out)
    assert after == json.loads((played.out / "report.json").read_text())
    assert {k: v for k, v in after.items() if k != "created"} == {
        k: v for k, v in before.items() if k != "created"
    }


def test_changed_recipe_starts_over_and_termination_leaves_nothing_running(played: Quickstart) -> None:
    """Last, as it throws away what was played. SIGTERM goes to the one process that a scheduler knows."""
    recipe = played.root / "recipes" / "parent.yaml"
    recipe.write_text(recipe.read_text() + "optimizer: {lr: 5e-3}\n")
    metrics = played.out / "work" / "parent" / "metrics.jsonl"
    old = metrics.stat().st_ino
    call = played.call(
        until=lambda: metrics.exists() and metrics.stat().st_ino != old and metrics.stat().st_size > 0,
        number=signal.SIGTERM,
    )
    assert (call.status, call.left) == (128 + signal.SIGTERM, []), call.err
    assert "the recipes or texts changed since the last run: starting over" in call.err
    assert "done before" not in call.err and "Traceback" not in call.err
    assert not any((played.out / name).exists() for name in ("run", "slices", "parent_hf", "elastic_hf"))
    steps = [line["step"] for line in _metrics(metrics.parent) if "step" in line]
    tracker = metrics.parent / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert steps == list(range(1, len(steps) + 1)) and int(tracker.read_text()) == len(steps)
