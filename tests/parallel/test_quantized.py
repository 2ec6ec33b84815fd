"""Quantising and distilling under any layout is doing so in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import quantized_jobs
import torch
from hf_models import stored
from layouts import LAYOUTS, Layout
from pool import RankPool
from quantised_dirs import bits

from elastic_megatron.checkpoint.amax import Amax, read_amax
from elastic_megatron.checkpoint.manifest import FILE, Manifest
from elastic_megatron.checkpoint.source import open_stored
from elastic_megatron.checkpoint.torch_dist import open_torch_dist
from elastic_megatron.conversion import Request, to_hf

STEPS, LENGTH, BATCH = 4, 16, 4
TIGHT = 1e-10
FORMATS = ("nvfp4", "fp8")
NAMES = ("TP2+SP", "TP2+SP+ETP1+EP2", "PP2", "CP2")
CUT_TWICE = {"tensor": 2, "sequence": True, "expert_tensor": 2, "expert": 2, "dispatcher": "allgather"}
QUANTIZED = (
    *(layout for layout in LAYOUTS if layout.name in NAMES),
    Layout(
        "TP2+SP+ETP2+EP2",
        4,
        CUT_TWICE,
        "experts cut and dealt over all ranks, which are two replicas of the rest",
    ),
)


@dataclass(frozen=True)
class Run:
    folder: Path
    lines: list[dict[str, Any]]

    @property
    def amax(self) -> dict[str, Amax]:
        return read_amax(self.folder / "checkpoints/iter_0000000")

    @cached_property
    def trained(self) -> dict[str, Any]:
        """The weights that training left."""
        folder = self.folder / f"checkpoints/iter_{STEPS:07d}"
        manifest = replace(Manifest.read(folder / FILE), quantised=None)
        return dict(open_torch_dist(folder, manifest, None).state())

    def of(self, key: str) -> list[Any]:
        return [line[key] for line in self.lines if key in line]

    @cached_property
    def exported(self) -> dict[str, Any]:
        """Tensors of the elastic directory of what calibration left."""
        target = self.folder / "exported"
        to_hf(open_stored(self.folder / "checkpoints/iter_0000000"), [Request(target, elastic=True)])
        return stored(target)


@pytest.fixture(scope="session")
def run_quantized(corpus: Path, ranks: RankPool) -> Callable[[str, int, dict[str, Any]], dict[str, Run]]:
    """Quantise and train under a layout; the runs by format."""
    family = corpus / "quantized_family"
    ranks.run(quantized_jobs.save_family, 1, str(family))
    source = [{"path": str(corpus / "text"), "weight": 1}]

    def recipe(name: str, form: str, parallel: dict[str, Any]) -> Path:
        # every layout's ranks that must share a draw do so with two samples
        stage = {"name": "qad", "tokens": STEPS * BATCH * LENGTH, "seq_length": LENGTH, "global_batch_size": BATCH,
                 "micro_batch_size": 1, "samples_per_draw": 2}  # fmt: skip
        values = {
            "name": "quantized",
            "run_dir": str(corpus / f"quantized_{name}_{form}"),
            "model": {"dtype": "fp32", "checkpoint": str(family)},
            "data": {"train": source, "valid": source, "cache": str(corpus / "cache")},
            "space": {"choices": quantized_jobs.CHOICES, "per_layer": quantized_jobs.PER_LAYER},
            "budgets": {
                n: {"metric": "active_params", "target": 1 - i / 4}
                for i, n in enumerate(quantized_jobs.WIDTHS)
            },
            "quantize": {"format": form, "preset": "default", "samples": 8, "seq_length": LENGTH},
            "optimizer": {"lr": 2e-3, "warmup_steps": 2, "eps": 1e-4, "clip_grad": 0.0},
            "log": {"tensorboard": False, "eval_tokens": 3 * LENGTH, "eval_interval": STEPS},
            "parallel": {**parallel, "distributed_optimizer": False},  # Megatron's other one takes no fp64
            "stages": [stage],
        }
        file = corpus / f"quantized_{name}_{form}.yaml"
        file.write_text(json.dumps(values))
        return file

    def run(name: str, world: int, parallel: dict[str, Any]) -> dict[str, Run]:
        files = [recipe(name, form, parallel) for form in FORMATS]
        logs, *_ = ranks.run(quantized_jobs.quantised, world, [str(f) for f in files], timeout=240)
        return {form: Run(f.with_suffix(""), log) for form, f, log in zip(FORMATS, files, logs, strict=True)}

    return run


@pytest.fixture(scope="session")
def alone(run_quantized: Callable[..., dict[str, Run]]) -> dict[str, Run]:
    return run_quantized("alone", 1, {})


@pytest.mark.parametrize("layout", QUANTIZED, ids=lambda layout: layout.name)
def test_calibration_and_distillation_are_those_of_one_process(
    layout: Layout, run_quantized: Callable[..., dict[str, Run]], alone: dict[str, Run]
) -> None:
    found = run_quantized(layout.name, layout.world, dict(layout.parallel))
    for form in FORMATS:
        mine, theirs = found[form], alone[form]
        assert_same_calibration(mine, theirs)
        assert_same_curves(mine, theirs)
        assert bits(mine.exported) == bits(theirs.exported)
        weights, wanted = mine.trained, theirs.trained
        assert weights.keys() == wanted.keys()
        for name, weight in wanted.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-6, atol=1e-9, msg=name)


def assert_same_calibration(mine: Run, theirs: Run) -> None:
    """The same magnitudes in fp32, to the bit, and the same experts without a token."""
    assert list(mine.amax.items()) == list(theirs.amax.items())
    assert mine.of("calibration") == theirs.of("calibration")


def assert_same_curves(mine: Run, theirs: Run) -> None:
    assert [list(line) for line in mine.lines] == [list(line) for line in theirs.lines]
    steps, wanted = ([line for line in run.lines if "loss" in line] for run in (mine, theirs))
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for a, b in zip(steps, wanted, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=TIGHT) and a["loss"] > 1e-3
        assert a["budget"] == b["budget"] and a["lr"] == b["lr"]
    for a, b in zip(mine.of("eval"), theirs.of("eval"), strict=True):
        assert a["weights"] == b["weights"] and list(a["submodels"]) == list(b["submodels"])
        for name, result in b["submodels"].items():
            assert a["submodels"][name] == pytest.approx(result, rel=TIGHT, abs=TIGHT), (name, a["step"])


def test_the_runs_are_about_something(alone: dict[str, Run]) -> None:
    """Budgets of each size are drawn, experts of two kinds go unseen, and rounding and training change losses."""
    for form, run in alone.items():
        drawn = [line["budget"] for line in run.lines if "loss" in line]
        assert {name for b in drawn for name in ([b] if isinstance(b, str) else b)} == set(
            quantized_jobs.WIDTHS
        )
        (unseen,) = [line["unseen"] for line in run.of("calibration")]
        assert all(set(experts) <= set(unseen[layer]) for layer, experts in quantized_jobs.UNSEEN.items())
        before, after, trained = run.of("eval")
        assert [e["weights"] for e in (before, after, trained)] == ["fp32", form, form]
        for name in quantized_jobs.WIDTHS:
            kls = [e["submodels"][name]["kl"] for e in (before, after, trained)]
            assert abs(kls[1] - kls[0]) > 1e-3 and abs(kls[2] - kls[1]) > 1e-3
