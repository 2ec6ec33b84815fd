"""What ranks do in the divergence tests: one of them sees what is not finite."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from elastic_megatron.checkpoint import tracker
from elastic_megatron.errors import UserError
from elastic_megatron.recipe import load
from elastic_megatron.training import train as module
from elastic_megatron.training.step import ForwardStep


def spoiled(recipe: str, odd: int, what: str, steps: Collection[int]) -> dict[str, Any]:
    """Train, while on rank ``odd`` gradients of some steps (0-based), or weights after them, are not finite.

    Returns the exit status and the words of this rank, the newest checkpoint, and the lines of the run.
    """
    here, loss, one_step = int(os.environ["RANK"]) == odd, ForwardStep._loss, module._Run._one_step

    def spoiled_loss(self: Any, batch: Any, *arguments: Any) -> Any:
        total, counted, sums = loss(self, batch, *arguments)
        if here and what == "gradient" and batch.step in steps:
            total.register_hook(lambda gradient: gradient * float("nan"))
        return total, counted, sums

    def spoiled_step(self: Any, step: int, lr: float) -> Any:
        asked = one_step(self, step, lr)
        if here and what == "weights" and step in steps:
            parameter = next(p for p in self.model.chunks[0].parameters() if p.ndim == 2)
            with torch.no_grad():
                parameter[0, 0] = float("inf")
        return asked

    ForwardStep._loss, module._Run._one_step = spoiled_loss, spoiled_step
    loaded, status, said = load(Path(recipe)), 0, ""
    try:
        module.train(loaded)
    except UserError as error:
        status, said = error.status, str(error)
    finally:
        ForwardStep._loss, module._Run._one_step = loss, one_step
    newest = tracker.newest(loaded.run_dir / "checkpoints")
    lines = [json.loads(line) for line in (loaded.run_dir / "metrics.jsonl").read_text().splitlines()]
    return {"status": status, "said": said, "newest": newest and newest.name, "lines": lines}
