"""Training under every layout is training in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import lcm
from pathlib import Path
from typing import Any

import pytest
import torch
import training_jobs
from layouts import LAYOUTS, Layout
from pool import RankPool

from elastic_megatron.data.prepare import prepare
from elastic_megatron.data.tokenizer import byte_tokenizer

STEPS = 10
LENGTH = 16
BATCH = 4
TEXT = Path(__file__).parents[2] / "examples" / "data"
BUDGETS = {
    "full": {"metric": "active_params", "target": 1.0},
    "medium": {"metric": "active_params", "target": 0.75},
    "small": {"metric": "total_params", "target": 0.5},
}
# eps: Adam must not turn the rounding of a vanishing gradient into a step of its own
OPTIMIZER = {"lr": 2e-3, "warmup_steps": 2, "eps": 1e-4}
ROUTER = {"inner_size": 16, "lr": 2e-2}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a parent of each kind and the data set ``text``."""
    folder = tmp_path_factory.mktemp("parallel")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    text = next(iter(sorted(TEXT.glob("*.txt")))).read_text()[:4000]
    (folder / "text.txt").write_text(text)
    prepare([folder / "text.txt"], folder / "text", folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def write(corpus: Path, ranks: RankPool) -> Callable[..., Path]:
    """Writes the recipe of a run: ``samples_per_draw`` and the parallel section are what differs."""

    def recipe(name: str, moe: bool, per_draw: int, parallel: dict[str, Any], **sections: Any) -> Path:
        parent = corpus / f"parent_{'moe' if moe else 'dense'}"
        if not parent.exists():
            ranks.run(training_jobs.save_parent, 1, str(parent), moe)
        stage = {"name": "all", "tokens": STEPS * BATCH * LENGTH, "seq_length": LENGTH,
                 "global_batch_size": BATCH, "micro_batch_size": 1, "samples_per_draw": per_draw}  # fmt: skip
        source = [{"path": str(corpus / "text"), "weight": 1}]
        values = {
            "name": "parallel",
            "run_dir": str(corpus / name),
            "model": {"dtype": "fp32", "checkpoint": str(parent)},
            "data": {"train": source, "valid": source, "cache": str(corpus / "cache")},
            "space": training_jobs.space_section(moe),
            "budgets": BUDGETS,
            "router": ROUTER,
            "loss": {"moe_aux_loss": 0.01, "moe_bias_update_rate": 0.01} if moe else {},
            "optimizer": OPTIMIZER,
            "log": {"tensorboard": False, "eval_tokens": 3 * LENGTH, "eval_interval": STEPS},
            "parallel": parallel,
            "stages": [stage],
            **sections,
        }
        file = corpus / f"{name}.yaml"
        file.write_text(json.dumps(values))
        return file

    return recipe


@pytest.fixture(scope="session")
def alone(write: Callable[..., Path], ranks: RankPool) -> Callable[[bool, int], dict[str, Any]]:
    """The run in one process, by model and draws."""
    found: dict[tuple[bool, int], dict[str, Any]] = {}

    def run(moe: bool, per_draw: int) -> dict[str, Any]:
        if (moe, per_draw) not in found:
            file = write(f"alone_{moe}_{per_draw}", moe, per_draw, {"recompute": "full"})
            (found[moe, per_draw],) = ranks.run(training_jobs.trained, 1, str(file), timeout=240)
        return found[moe, per_draw]

    return run


def per_draw(layout: Layout) -> int:
    """Samples that must share a draw: those of the data-parallel ranks in one block of ranks that exchange tokens."""
    dense = layout.size("tensor") * layout.size("context")
    experts = layout.size("expert") * (layout.parallel.get("expert_tensor") or layout.size("tensor"))
    return lcm(dense, experts) // dense


def steps_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [line for line in run["lines"] if "loss" in line]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_ten_steps_are_those_of_one_process(
    layout: Layout, write: Callable[..., Path], alone: Callable[..., Any], ranks: RankPool, record: Any
) -> None:
    record(layout.name, "training")
    expected = alone(layout.moe, per_draw(layout))
    parallel = {"recompute": "full", **layout.parallel}
    file = write(layout.name, layout.moe, per_draw(layout), parallel)
    results = ranks.run(training_jobs.trained, layout.world, str(file), timeout=240)
    found = results[0]
    assert len(steps_of(found)) == STEPS
    for mine, theirs in zip(steps_of(found), steps_of(expected), strict=True):
        for key in ("loss", "kd_loss", "router_loss"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-7), (theirs["step"], key)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert mine["budget"] == theirs["budget"] and mine["lr"] == theirs["lr"]
    for name, weight in expected["router"].items():
        torch.testing.assert_close(found["router"][name], weight, rtol=0, atol=1e-5)
        # the same bits everywhere, whatever each rank saw
        assert all(torch.equal(other["router"][name], found["router"][name]) for other in results)
    realised, wanted = (
        [line["router"]["budgets"][b]["widths"] for line in run["lines"] if "router" in line for b in BUDGETS]
        for run in (found, expected)
    )
    assert realised == wanted != []
    losses, others = (
        [r["loss"] for line in run["lines"] if "eval" in line for r in line["eval"]["submodels"].values()]
        for run in (found, expected)
    )
    assert losses == pytest.approx(others, rel=1e-5) and losses


def test_the_comparison_notices_one_percent_of_a_learning_rate(
    write: Callable[..., Path], alone: Callable[..., Any], ranks: RankPool
) -> None:
    """Every budget is drawn and widths differ by layer; a gradient that is 1 % off would show."""
    expected = alone(True, 1)
    assert {b for line in steps_of(expected) for b in line["budget"]} == set(BUDGETS)
    widths = [line["router"]["budgets"]["small"]["widths"] for line in expected["lines"] if "router" in line]
    assert any(isinstance(w, list) and len(set(w)) > 1 for w in widths[-1].values())
    for section, field, rate in (("optimizer", "lr", 2.02e-3), ("router", "lr", 2.02e-2)):
        sections = {"optimizer": OPTIMIZER, "router": ROUTER}
        sections[section] = {**sections[section], field: rate}
        (found,) = ranks.run(training_jobs.trained, 1, str(write(f"off_{section}", True, 1, {}, **sections)))
        last, other = steps_of(found)[-1], steps_of(expected)[-1]
        assert abs(last["loss"] / other["loss"] - 1) > 1e-4
        if section == "router":
            moved = [(w - found["router"][n]).abs().max() for n, w in expected["router"].items()]
            assert max(moved) > 1e-3
