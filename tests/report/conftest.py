"""A made-up run folder with the exact shape of a real one: three sizes, a router that settles, a ranking."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

PATTERN = "MEM*EMEM*E"
AXES = {
    "hidden_size": (256, [128, 160, 192, 256]),
    "moe_ffn_hidden_size": (128, [32, 64, 96, 128]),
    "num_moe_experts": (16, [8, 12, 16]),
    "mamba_num_heads": (16, [8, 12, 16]),
}
CHOSEN = {
    "full": {"hidden_size": 256, "moe_ffn_hidden_size": 128, "num_moe_experts": 16, "mamba_num_heads": 16},
    "medium": {"hidden_size": 192, "moe_ffn_hidden_size": 96, "num_moe_experts": 16, "mamba_num_heads": 12},
    "small": {
        "hidden_size": 128,
        "moe_ffn_hidden_size": [64, 96, 64, 32],
        "num_moe_experts": 12,
        "mamba_num_heads": 8,
    },
}
TARGETS = {"full": 1.0, "medium": 0.62, "small": 0.33}
LOSSES = {"full": (1.392, 1.392, 1.401), "medium": (2.93, 1.871, 1.468), "small": (3.71, 2.746, 1.655)}
STEPS, TOKENS_PER_STEP = 1200, 2048


def metrics_lines(seed: int = 7) -> list[dict[str, Any]]:
    """Steps of one budget each, 30 evaluations, 60 router lines; temperatures and losses fall."""
    rng = np.random.default_rng(seed)
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        done, tokens = step / STEPS, step * TOKENS_PER_STEP
        name = str(rng.choice(list(CHOSEN), p=[0.34, 0.33, 0.33] if done < 0.6 else [0.5, 0.3, 0.2]))
        kd = 0.02 + (LOSSES[name][1] - 1.3) * 0.9 * math.exp(-5 * done) + abs(rng.normal(0, 0.03))
        router = 0.3 * math.exp(-6 * done) * abs(rng.normal(1, 0.3))
        lines.append(
            {
                "step": step,
                "tokens": tokens,
                "loss": kd + router,
                "kd_loss": kd,
                "router_loss": router,
                "budget": name,
                "lr": 3e-4 * min(1.0, step / 60) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done))),
                "grad_norm": 0.6 + 2.4 * math.exp(-8 * done) + abs(rng.normal(0, 0.15)),
                "step_ms": {"full": 212.0, "medium": 138.0, "small": 84.0}[name] + rng.normal(0, 4),
                "stage": "short context" if done < 0.6 else "long context",
            }
        )
        if step % (STEPS // 30) == 0:
            lines.append({"eval": eval_line(step, done)})
        if step % (STEPS // 60) == 0:
            lines.append({"router": router_line(step, done, rng)})
    return lines


def eval_line(step: int, done: float) -> dict[str, Any]:
    decay = math.exp(-4.5 * done)
    losses = {name: end + (start - end) * decay for name, (_, start, end) in LOSSES.items()}
    submodels = {name: {"loss": loss, "tokens": 16384} for name, loss in losses.items()}
    return {"step": step, "tokens": step * TOKENS_PER_STEP, "submodels": submodels}


def router_line(step: int, done: float, rng: np.random.Generator) -> dict[str, Any]:
    sharp = 0.2 + 9 * done**1.5
    budgets = {}
    for name, chosen in CHOSEN.items():
        probs: dict[str, Any] = {}
        for axis, (_, choices) in AXES.items():
            wanted = chosen[axis]
            layers = [
                softmax([sharp * (c == w) + rng.normal(0, 0.5 * (1 - done)) for c in choices])
                for w in (wanted if isinstance(wanted, list) else [wanted])
            ]
            probs[axis] = layers if isinstance(wanted, list) else layers[0]
        widths = {
            axis: [AXES[axis][1][int(np.argmax(q))] for q in p]
            if isinstance(p[0], list)
            else AXES[axis][1][int(np.argmax(p))]
            for axis, p in probs.items()
        }
        cost = TARGETS[name] + (0.7 - TARGETS[name]) * math.exp(-5 * done)
        realised = TARGETS[name] + round((cost - TARGETS[name]) / 0.08) * 0.08 + 0.006
        budgets[name] = {
            "cost": cost,
            "realised": realised,
            "target": TARGETS[name],
            "widths": widths,
            "probs": probs,
        }
    choices = {axis: options for axis, (_, options) in AXES.items()}
    return {"step": step, "tau": 0.05**done, "budgets": budgets, "choices": choices}


def softmax(logits: list[float]) -> list[float]:
    raised = np.exp(np.array(logits) - max(logits))
    return (raised / raised.sum()).tolist()


def report_object() -> dict[str, Any]:
    sizes = {
        "full": (12_345_678, 3_210_987),
        "medium": (6_543_210, 1_987_654),
        "small": (2_876_543, 1_060_000),
    }
    samples = {
        "full": "The river had risen in the night, and the miller's daughter counted the stones still dry.",
        "medium": "The river had risen in the night, and the stones were gone <b>before</b> morning.",
        "small": "The river was in the night, and the man was the river & the night was long.",
    }
    submodels = {}
    for name, (total, active) in sizes.items():
        unsorted, kept, trained = LOSSES[name]
        submodels[name] = {
            "budget": {"metric": "active_params", "target": TARGETS[name], "unit": "ratio"},
            "widths": CHOSEN[name],
            "total_params": total,
            "active_params": active,
            "flops_per_token": 2 * active,
            "weights_bytes": {"bf16": 2 * total, "fp8": int(1.1 * total), "nvfp4": int(0.62 * total)},
            "loss_unsorted_slice": unsorted,
            "loss_sorted_slice": kept,
            "loss_trained": trained,
            "gap_closed": None if name == "full" else (kept - trained) / (kept - 1.392),
            "target_cost": TARGETS[name],
            "realised_cost": TARGETS[name] + 0.004,
            "cost_error": 0.004 / TARGETS[name],
            "sample": samples[name],
        }
    return {
        "name": "three sizes of a small hybrid",
        "created": "2026-03-01T12:00:00+00:00",
        "command": "elastic-megatron quickstart --out quickstart",
        "seed": 1234,
        "versions": {"elastic_megatron": "0.1.0", "megatron-core": "0.19.2", "torch": "2.13.0"},
        "machine": {"cpu": "an invented processor", "cores": 2, "memory_gb": 8},
        "parent": {
            "total_params": 12_345_678,
            "active_params": 3_210_987,
            "loss": 1.392,
            "pattern": PATTERN,
            **{axis: width for axis, (width, _) in AXES.items()},
        },
        "submodels": submodels,
        "phases": [
            {"name": "parent", "seconds": 181.4},
            {"name": "rank", "seconds": 9.6},
            {"name": "train", "seconds": 205.2},
            {"name": "export", "seconds": 4.1},
            {"name": "evaluate", "seconds": 31.0},
        ],
        "data": {"train_tokens": STEPS * TOKENS_PER_STEP, "eval_tokens": 16384, "unit": "nats per byte"},
    }


def ranking_tensors(seed: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def score(*shape: int) -> np.ndarray:
        return rng.gamma(1.2, 1.0, shape).astype(np.float32)

    tensors = {"hidden_size.score": score(256), "num_layers.score": score(len(PATTERN)) * 0.02}
    for layer, kind in enumerate(PATTERN):
        if kind == "M":
            tensors[f"layers.{layer}.mamba_num_heads.score"] = score(16)
        elif kind == "*":
            tensors[f"layers.{layer}.num_attention_heads.score"] = score(8)
        else:
            tensors[f"layers.{layer}.moe_ffn_hidden_size.score"] = score(16, 128)
            tensors[f"layers.{layer}.num_moe_experts.score"] = score(16)
            seen = rng.multinomial(40_000, rng.dirichlet([1.6] * 16)).astype(np.int64)
            tensors[f"layers.{layer}.num_moe_experts.tokens"] = seen
    orders = {
        key[: -len("score")] + "order": np.argsort(-t, axis=-1)
        for key, t in tensors.items()
        if "score" in key
    }
    return tensors | orders


def write_run(folder: Path) -> Path:
    """Write the whole synthetic run folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(line) + "\n" for line in metrics_lines())
    (folder / "metrics.jsonl").write_text(lines)
    (folder / "report.json").write_text(json.dumps(report_object()))
    (folder / "recipe.yaml").write_text(
        "name: three-sizes\nbudgets:\n  small: {metric: active_params, target: 0.33}\n"
    )
    save_file(ranking_tensors(), folder / "ranking.safetensors")
    (folder / "ranking.json").write_text(json.dumps({"layer_types": PATTERN, "tokens": 65536}))
    return folder


@pytest.fixture(scope="session")
def write_folder() -> Callable[[Path], Path]:
    return write_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")
