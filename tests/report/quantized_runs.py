"""A quantised run's folder: the lines of ``metrics.jsonl`` by hand, and a real description of its checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantised_dirs import SHAPE, family

from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.quantised_plan import planned
from elastic_megatron.quantization.formats import NVFP4
from elastic_megatron.quantization.presets import PRESETS

# name: (loss, KL) of the model as it was, after calibration, after distillation
STATES = {
    "whole": ((2.0, 0.0), (2.1, 0.08), (2.02, 0.02)),
    "middle": ((2.4, 0.3), (2.7, 0.5), (2.45, 0.35)),
    "smallest": ((3.0, 0.6), (3.3, 1.0), (3.6, 1.2)),
}
UNSEEN = {"decoder.layers.1": [3, 7]}


def manifest(**names: Any) -> Manifest:
    """Of the family, of which every attention, the Mamba layers before one, and what ``keep`` says stay."""
    shape = replace(family(), submodels={name: family().submodels[name] for name in STATES})
    how = {"keep_feeding_mamba": True, "keep": (), "version": "0.47.0", **names}
    return replace(shape, quantised=planned(NVFP4, SHAPE, PRESETS["mamba_moe_aggressive"].blocks, **how))


def eval_line(step: int, weights: str, state: int, share: float = 1.0) -> dict[str, Any]:
    """Of one state; ``share`` of the way from PTQ where it is QAD."""
    found = {}
    for name, states in STATES.items():
        (loss, kl), (from_loss, from_kl) = states[state], states[min(state, 1)]
        found[name] = {
            "loss": from_loss + share * (loss - from_loss),
            "kl": from_kl + share * (kl - from_kl),
            "tokens": 4096,
        }
    return {"eval": {"step": step, "tokens": 100 * step, "weights": weights, "submodels": found}}


def before_training() -> list[dict[str, Any]]:
    calibration = {"calibration": {"step": 0, "tokens": 8192, "unseen": UNSEEN}}
    return [eval_line(0, "fp32", 0), calibration, eval_line(0, "nvfp4", 1)]


def steps(n: int = 40) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, n + 1):
        lines.append({"step": step, "tokens": 100 * step, "loss": 0.5, "kd_loss": 0.5, "budget": "whole"})
        if step % 10 == 0:
            lines.append(eval_line(step, "nvfp4", 2, step / n))
    return lines


def write_lines(folder: Path, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_checkpoint(folder: Path, described: Manifest, iteration: int = 40) -> None:
    root = folder / "checkpoints"
    (root / f"iter_{iteration:07d}").mkdir(parents=True)
    described.write(root / f"iter_{iteration:07d}" / "elastic.json")
    (root / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
