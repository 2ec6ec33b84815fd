"""A tiny corpus, a tiny trained parent, and recipes over them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_megatron.recipe import Recipe, load
from elastic_megatron.training.train import train

SIZES = {
    "hybrid_layer_pattern": "ME*-",
    "hidden_size": 24,
    "vocab_size": 264,
    "max_position_embeddings": 64,
    "ffn_hidden_size": 20,
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "mamba_state_dim": 5,
    "mamba_num_groups": 2,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 6,
    "num_moe_experts": 6,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 10,
    "moe_shared_expert_intermediate_size": 12,
}
STAGES = [
    {
        "name": "uniform",
        "tokens": 4 * 8 * 16,
        "seq_length": 16,
        "global_batch_size": 8,
        "micro_batch_size": 4,
    },
    {
        "name": "weighted",
        "tokens": 2 * 4 * 32,
        "seq_length": 32,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "budget_probs": {"full": 0.5, "small": 0.5},
        "lr": 5e-4,
    },
]
BUDGETS = {
    "full": {"metric": "active_params", "target": 1.0},
    "medium": {"metric": "active_params", "target": 0.8},
    "small": {"metric": "total_params", "target": 0.6},
}
SPACE = {
    "choices": {
        "hidden_size": [16, 20],
        "num_moe_experts": [4, 3],
        "mamba_num_heads": [2],
        "ffn_hidden_size": [10],
        "num_layers": [3],
    },
    "per_layer": ["num_moe_experts"],
}


def corpus(seed: int, words: int) -> str:
    """Text with some structure: a random walk over a small vocabulary."""
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 6))) for _ in range(60)]
    follows = {w: rng.sample(vocabulary, 3) for w in vocabulary}
    word, out = vocabulary[0], []
    for _ in range(words):
        out.append(word)
        word = rng.choice(follows[word])
    return " ".join(out) + "\n"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prefixes of a training and a validation set, and the tokenizer's directory."""
    from elastic_megatron.data.prepare import prepare
    from elastic_megatron.data.tokenizer import byte_tokenizer

    folder = tmp_path_factory.mktemp("corpus")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    for name, seed, words in (("train", 1, 1500), ("valid", 2, 200)):
        (folder / f"{name}.txt").write_text(corpus(seed, words))
        prepare([folder / f"{name}.txt"], folder / name, folder / "tokenizer")
    return {name: folder / name for name in ("train", "valid", "tokenizer")}


@pytest.fixture(scope="session")
def write_recipe(data: dict[str, Path]) -> Callable[..., Path]:
    """Writes a recipe for a run folder and returns its file."""

    def write(run_dir: Path, **sections: Any) -> Path:
        values: dict[str, Any] = {
            "name": "tiny",
            "run_dir": str(run_dir),
            "data": {
                "train": [{"path": str(data["train"]), "weight": 1}],
                "valid": [{"path": str(data["valid"]), "weight": 1}],
            },
            "optimizer": {"lr": 1e-3, "warmup_steps": 2},
            "log": {"tensorboard": False, "eval_tokens": 64, "eval_interval": 3},
            "stages": STAGES,
            **sections,
        }
        path = run_dir.parent / f"{run_dir.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
        return path

    return write


@pytest.fixture(scope="session")
def parent_sizes() -> dict[str, Any]:
    return SIZES


@pytest.fixture(scope="session")
def parent(
    megatron: Any,
    write_recipe: Callable[..., Path],
    data: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Run folder of a parent trained for three steps."""
    run_dir = tmp_path_factory.mktemp("parent") / "run"
    path = write_recipe(
        run_dir,
        model={"dtype": "fp32", "sizes": SIZES, "tokenizer": str(data["tokenizer"])},
        loss={"kind": "cross_entropy", "moe_bias_update_rate": 0.01},
        stages=[
            {
                "name": "parent",
                "tokens": 3 * 8 * 16,
                "seq_length": 16,
                "global_batch_size": 8,
                "micro_batch_size": 8,
            }
        ],
    )
    train(load(path))
    return run_dir


@pytest.fixture(scope="session")
def recipe_file(write_recipe: Callable[..., Path], parent: Path) -> Callable[..., Path]:
    """Writes an elastic recipe over the parent; keyword arguments replace its sections."""

    def make(run_dir: Path, **sections: Any) -> Path:
        defaults: dict[str, Any] = {
            "model": {"dtype": "fp32", "checkpoint": str(parent)},
            "space": SPACE,
            "budgets": BUDGETS,
            "router": {"inner_size": 16},
            "checkpoint": {"interval": 3, "keep_last": 3},
            "loss": {"moe_aux_loss": 0.01, "moe_bias_update_rate": 0.01},
        }
        return write_recipe(run_dir, **(defaults | sections))

    return make


@pytest.fixture(scope="session")
def elastic(recipe_file: Callable[..., Path]) -> Callable[..., Recipe]:
    """As ``recipe_file``, loaded."""

    def make(run_dir: Path, **sections: Any) -> Recipe:
        return load(recipe_file(run_dir, **sections))

    return make
