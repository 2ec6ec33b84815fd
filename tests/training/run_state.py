"""What a run left: its metrics without the wall clock, and its state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_megatron.checkpoint import distributed
from elastic_megatron.checkpoint.resolve import elastic_space
from elastic_megatron.checkpoint.tracker import newest
from elastic_megatron.recipe import Recipe
from elastic_megatron.training import train as training
from elastic_megatron.training.build import build_student
from elastic_megatron.training.family import parent_source


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics without the wall clock."""
    out = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in out:
        line.pop("step_ms", None)
    return out


def state_of(recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Every weight (router included) and the optimizer state of the newest checkpoint."""
    source = parent_source(recipe)
    model = build_student(recipe, source, elastic_space(recipe, source.manifest))
    path = newest(recipe.run_dir / "checkpoints")
    assert path is not None
    distributed.load(path, model.chunks, optimizer=model.optimizer)
    weights = {n: t.clone() for n, t in model.chunks[0].state_dict().items() if isinstance(t, Tensor)}
    moments = {
        f"{n}.{key}": value.clone()
        for n, p in enumerate(model.optimizer.get_parameters())
        for optimizer in getattr(model.optimizer, "chained_optimizers", [model.optimizer])
        for key, value in optimizer.optimizer.state.get(p, {}).items()
    }
    return weights, moments


def crash_before(recipe: Recipe, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, and die before this step (0-based) as if killed."""
    one_step = training._Run._one_step

    def crash(self: Any, now: int, lr: float) -> Any:
        if now == step:
            raise KeyboardInterrupt
        return one_step(self, now, lr)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_one_step", crash)
        with pytest.raises(KeyboardInterrupt):
            training.train(recipe)


def assert_same_state(a: Recipe, b: Recipe) -> None:
    for mine, theirs in zip(state_of(a), state_of(b), strict=True):
        assert set(mine) == set(theirs) and mine
        for name, value in theirs.items():
            assert torch.equal(mine[name], value), name
