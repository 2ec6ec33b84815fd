"""The runs that the parallel tests compare: their data, their parents, and their recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import lcm
from pathlib import Path
from typing import Any

import pytest
import training_jobs
from layouts import Layout
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
    text = (TEXT / "shakespeare_train.txt").read_text()[:4000]
    (folder / "text.txt").write_text(text)
    prepare([folder / "text.txt"], folder / "text", folder / "tokenizer")
    return folder


@pytest.fixture(scope="session")
def write(corpus: Path, ranks: RankPool) -> Callable[..., Path]:
    """Writes the recipe of a run; other sections replace those here.

    ``stage`` updates the only one; ``dtype``, ``tied`` (embedding and output layer) and ``gpus`` (sizes that kernels
    take) choose the model.
    """

    def recipe(name: str, moe: bool, per_draw: int, parallel: dict[str, Any], **sections: Any) -> Path:
        tied, gpus = sections.pop("tied", False), sections.pop("gpus", False)
        parent = corpus / f"parent_{'moe' if moe else 'dense'}{'_tied' * tied}{'_gpus' * gpus}"
        if not parent.exists():
            ranks.run(training_jobs.save_parent, 1, str(parent), moe, tied, gpus)
        stage = {"name": "all", "tokens": STEPS * BATCH * LENGTH, "seq_length": LENGTH,
                 "global_batch_size": BATCH, "micro_batch_size": 1, "samples_per_draw": per_draw,
                 **sections.pop("stage", {})}  # fmt: skip
        source = [{"path": str(corpus / "text"), "weight": 1}]
        values = {
            "name": "parallel",
            "seed": 5,  # one without near ties between experts, which rounding would break either way
            "run_dir": str(corpus / name),
            "model": {"dtype": sections.pop("dtype", "fp32"), "checkpoint": str(parent)},
            "data": {"train": source, "valid": source, "cache": str(corpus / "cache")},
            "space": training_jobs.space_section(moe, gpus),
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


def per_draw(layout: Layout) -> int:
    """Samples that must share a draw: those of the data-parallel ranks in one block of ranks that exchange tokens."""
    dense = layout.size("tensor") * layout.size("context")
    experts = layout.size("expert") * (layout.parallel.get("expert_tensor") or layout.size("tensor"))
    return lcm(dense, experts) // dense


def assert_same_losses(mine: dict[str, Any], theirs: dict[str, Any], *more: str) -> None:
    """Two lines of metrics.jsonl agree to rounding, ``more`` keys included.

    The router's loss is |cost / target - 1|: rounding moves it by shares of the cost, however small it is itself.
    """
    for key in ("loss", "kd_loss", "router_loss", *more):
        bound = 3e-5 if key == "router_loss" else 1e-7
        assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=bound), (theirs["step"], key)
