"""Megatron-LM's own ``pretrain`` with our tool trains what our own loop trains.

Megatron's runs happen in forks of one process beside this one (``megatron_training_on_cpu``), ours in this one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZES, SPACE, flags

from elastic_megatron.blocks import build_elastic_model
from elastic_megatron.checkpoint import distributed, tracker
from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.checkpoint.manifest import FILE, Manifest
from elastic_megatron.checkpoint.slice import slice_state
from elastic_megatron.checkpoint.source import open_stored
from elastic_megatron.conversion import Request, to_hf
from elastic_megatron.data.prepare import prepare
from elastic_megatron.data.tokenizer import byte_tokenizer
from elastic_megatron.recipe import Recipe, load
from elastic_megatron.training.build import build_router
from elastic_megatron.training.rank import rank
from elastic_megatron.training.train import train

TOOL = Path(__file__).parents[2] / "tools" / "pretrain_elastic.py"
STEPS, BATCH, LENGTH = 4, 8, 16
BUDGETS = {
    "full": {"metric": "active_params", "target": 1.0},
    "medium": {"metric": "active_params", "target": 0.8},
    "small": {"metric": "total_params", "target": 0.6},
}
_LINE = re.compile(r"iteration +(\d+)/.*\| loss: (\S+) \| kd loss: (\S+) \| router loss: (\S+) \|")


@dataclass(frozen=True)
class Runs:
    """Folders of our runs (``ours``: train after ``ranked``: rank) and Megatron's, and what Megatron's printed."""

    folder: Path
    recipe: Recipe
    statuses: dict[str, list[int]]

    def log(self, name: str) -> str:
        ranks = len(self.statuses[name])
        return "".join((self.folder / f"{name}.log.{r}").read_text() for r in range(ranks))

    def losses(self, name: str) -> dict[int, list[float]]:
        """(loss, kd loss, router loss) of every iteration that a run of Megatron printed."""
        return {int(i): [float(v) for v in values] for i, *values in _LINE.findall(self.log(name))}

    def weights(self, checkpoint: Path) -> dict[str, torch.Tensor]:
        """What our own commands read from a checkpoint, the router included."""
        space = Manifest.read(checkpoint / FILE).space
        assert space is not None
        model = build_elastic_model(space)
        model.budget_router = build_router(self.recipe, space)
        distributed.load(checkpoint, [model])
        return {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


@pytest.fixture(scope="module")
def runs(megatron: Any, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("megatron_lm")
    recipes = _recipes(folder)
    train(load(recipes["parent"]))
    # as Megatron-LM leaves its checkpoints: without our description
    shutil.copytree(folder / "parent" / "checkpoints", folder / "foreign")
    (tracker.folder(folder / "foreign", STEPS) / FILE).unlink()
    rank(load(recipes["ranked"]))
    train(load(recipes["ours"]))
    statuses = _megatron(folder, recipes["elastic"])
    return Runs(folder, load(recipes["ours"]), statuses)


def _recipes(folder: Path) -> dict[str, Path]:
    words = " ".join(f"w{i * i % 97}" for i in range(1500))
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "text.txt").write_text(words + "\n")
    prepare([folder / "text.txt"], folder / "text", folder / "tokenizer")
    stage = {"tokens": STEPS * BATCH * LENGTH, "seq_length": LENGTH, "global_batch_size": BATCH}
    common = {
        "data": {"train": [{"path": "text", "weight": 1}]},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
        "log": {"tensorboard": False},
        "stages": [{"name": "one", **stage, "micro_batch_size": 2}],
    }
    elastic = common | {
        "space": SPACE,
        "budgets": BUDGETS,
        "router": {"inner_size": 16},
        "rank": {"samples": 8, "seq_length": LENGTH, "micro_batch_size": 2, "depth": True},
        "loss": {"moe_aux_loss": 0.01, "moe_bias_update_rate": 0.01},
    }
    sizes = {"dtype": "fp32", "sizes": SIZES, "tokenizer": "tokenizer"}
    parent, ranked = ({"dtype": "fp32", "checkpoint": name} for name in ("parent", "ranked"))
    contents = {
        "parent": common | {"model": sizes, "loss": {"kind": "cross_entropy"}},
        "ranked": elastic | {"model": parent},
        "ours": elastic | {"model": ranked},
        "elastic": elastic | {"model": parent},  # Megatron names the parent
    }
    for name, content in contents.items():
        (folder / f"{name}.yaml").write_text(json.dumps({"name": name, "run_dir": name, **content}))
    return {name: folder / f"{name}.yaml" for name in contents}


def _megatron(folder: Path, recipe: Path) -> dict[str, list[int]]:
    """Run the tool under Megatron's ``pretrain``, several times."""
    common = [
        *flags(), "--micro-batch-size", "2", "--global-batch-size", str(BATCH), "--seq-length", str(LENGTH),
        "--train-iters", str(STEPS), "--lr", "1e-3", "--lr-decay-style", "constant", "--weight-decay", "0",
        "--adam-beta2", "0.95", "--log-interval", "1", "--num-workers", "0",
        "--train-data-path", f"{folder}/text", "--valid-data-path", f"{folder}/text", "--test-data-path",
        f"{folder}/text", "--eval-interval", "2", "--save-interval", "2", "--data-cache-path", f"{folder}/cache",
        "--elastic-recipe", str(recipe), "--pretrained-checkpoint", f"{folder}/foreign",
    ]  # fmt: skip
    fresh = ["--elastic-rank", "--eval-iters", "0", "--load"]
    runs = {
        "whole": (1, ["--elastic-rank", "--eval-iters", "1", "--load", "whole", "--save", "whole"]),
        "resumed": (1, [*fresh, "whole", "--save", "resumed", "--ckpt-step", "2"]),
        "tensor": (2, [*fresh, "tensor", "--tensor-model-parallel-size", "2", "--sequence-parallel"]),
        "cyclic": (1, [*fresh, "none", "--dataloader-type", "cyclic"]),
        "other_size": (1, [*fresh, "none", "--moe-ffn-hidden-size", "12"]),
        "other_folder": (1, [*fresh, "foreign"]),
    }
    jobs = [
        {"script": str(TOOL), "arguments": [*common, *extra], "ranks": ranks, "log": f"{name}.log"}
        for name, (ranks, extra) in runs.items()
    ]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("NVTE_")}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("megatron_training_on_cpu.py"))],
        input=json.dumps(jobs), capture_output=True, text=True, timeout=540, cwd=folder,
        env=clean | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return dict(zip(runs, json.loads(ran.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", ["whole", "tensor"])
def test_megatrons_loop_and_ours_lose_the_same(runs: Runs, name: str) -> None:
    assert set(runs.statuses[name]) == {0}, runs.log(name)[-2000:]
    lines = [json.loads(line) for line in (runs.folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    ours = [[line[k] for k in ("loss", "kd_loss", "router_loss")] for line in lines if "loss" in line]
    # Megatron prints the mean of the first two iterations in place of the second
    ours[1] = [(a + b) / 2 for a, b in zip(*ours[:2], strict=True)]
    theirs = runs.losses(name)
    assert sorted(theirs) == list(range(1, STEPS + 1))
    for iteration, values in theirs.items():
        *losses, router = zip(values, ours[iteration - 1], strict=True)
        # seven digits are printed; divergences are differences of larger numbers, and so is the router's loss
        assert all(mine == pytest.approx(here, rel=1e-5, abs=1e-7) for mine, here in losses), iteration
        assert router[0] == pytest.approx(router[1], rel=1e-5, abs=3e-5), iteration


def test_ranking_router_and_choices_are_those_of_our_commands(runs: Runs) -> None:
    ours, theirs = (
        Manifest.read(tracker.resolve(runs.folder / name) / FILE) for name in ("ours/checkpoints", "whole")
    )
    assert theirs.ranking is not None
    assert (theirs.space, theirs.ranking, theirs.budgets) == (ours.space, ours.ranking, ours.budgets)
    assert theirs.submodels == ours.submodels and len(theirs.submodels) == len(BUDGETS)
    assert (runs.folder / "whole" / "elastic" / "ranking.safetensors").exists()


def test_our_commands_read_the_weights_that_our_loop_would_have_left(runs: Runs) -> None:
    ours, theirs = (
        runs.weights(tracker.resolve(runs.folder / name)) for name in ("ours/checkpoints", "whole")
    )
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert (value - ours[name]).norm() <= 1e-4 * ours[name].norm(), name


def test_its_checkpoints_convert_as_ours_do(runs: Runs, tmp_path: Path) -> None:
    """Whole and cut, by the path of the run; bit by bit what loading it gives."""
    source = open_stored(runs.folder / "whole")
    weights = runs.weights(source.path)
    names = list(source.manifest.submodels)
    to_hf(
        source, [Request(tmp_path / "all", elastic=True), Request(tmp_path / "cut", names[-1])], verify=True
    )
    exported = dict(read_hf(tmp_path / "all").state())
    assert len(exported) > 10 and all(torch.equal(weights[name], t) for name, t in exported.items())
    space = source.manifest.space
    assert space is not None
    cut = slice_state(space, source.manifest.submodels[names[-1]], exported.items())
    found = dict(read_hf(tmp_path / "cut").state())
    assert all(torch.equal(found.pop(name), tensor) for name, tensor in cut) and not found


def test_the_router_has_learned_at_its_own_rate(runs: Runs) -> None:
    """Adam's first steps are as long as the learning rate, ten times the model's here."""
    saved = runs.weights(tracker.resolve(runs.folder / "whole"))
    space = Manifest.read(tracker.resolve(runs.folder / "whole") / FILE).space
    assert space is not None
    start = build_router(runs.recipe, space).state_dict()
    moved = max(float((saved[f"budget_router.{k}"] - v).abs().max()) for k, v in start.items())
    lr = runs.recipe.router.lr
    assert lr == 1e-2 and 0.9 * lr < moved < STEPS * 1.5 * lr


def test_a_resumed_run_continues_bit_by_bit(runs: Runs) -> None:
    assert runs.statuses["resumed"] == [0], runs.log("resumed")[-2000:]
    assert runs.losses("resumed")[3] == runs.losses("whole")[3]
    whole, resumed = (runs.weights(tracker.folder(runs.folder / n, STEPS)) for n in ("whole", "resumed"))
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_every_checkpoint_says_what_its_router_chooses(runs: Runs) -> None:
    for iteration in (2, STEPS):
        manifest = Manifest.read(tracker.folder(runs.folder / "whole", iteration) / FILE)
        assert set(manifest.submodels) == set(BUDGETS) and manifest.shape.vocab_size == SIZES["vocab_size"]


def test_validation_scores_every_submodel(runs: Runs) -> None:
    scored = re.findall(r"submodel (\w+) \| validation loss (\S+) \| tokens (\d+)", runs.log("whole"))
    # after the second and the last iteration, and at the end
    assert [name for name, _, _ in scored[: len(BUDGETS)]] == list(BUDGETS)
    assert all(0 < float(loss) < 10 and int(tokens) == BATCH * (LENGTH - 1) for _, loss, tokens in scored)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cyclic", "--dataloader-type is cyclic, but elastic training needs single"),
        ("other_size", "foreign/iter_0000004 cannot be loaded (Global shape mismatch"),
        ("other_folder", "name them in --pretrained-checkpoint"),
    ],
)
def test_what_does_not_fit_together_ends_in_one_line(runs: Runs, name: str, message: str) -> None:
    assert runs.statuses[name] == [2]
    errors = [line for line in runs.log(name).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], errors
    assert "Traceback" not in runs.log(name)
