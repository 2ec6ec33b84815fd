"""Law 10 and what surrounds it: the teacher, the loss of a step, and its independence of micro-batching."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_megatron.checkpoint.resolve import elastic_space
from elastic_megatron.errors import UserError
from elastic_megatron.recipe import Recipe, load
from elastic_megatron.router.loss import relative_cost
from elastic_megatron.training import train as module
from elastic_megatron.training.build import Model, build_student, build_teacher
from elastic_megatron.training.family import parent_source
from elastic_megatron.training.train import train

pytestmark = pytest.mark.usefixtures("megatron")
ONE_STAGE = [
    {"name": "one", "tokens": 2 * 8 * 16, "seq_length": 16, "global_batch_size": 8, "micro_batch_size": 4}
]
ONLY_FULL = {"full": {"metric": "active_params", "target": 1.0}}


def step_lines(recipe: Recipe) -> list[dict[str, Any]]:
    lines = [json.loads(text) for text in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize(("dtype", "sharded"), [("fp32", True), ("fp32", False), ("bf16", True)])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_the_full_budget_starts_with_divergence_exactly_zero(
    elastic: Callable[..., Recipe], parent: Path, tmp_path: Path, kind: str, dtype: str, sharded: bool
) -> None:
    recipe = elastic(
        tmp_path / "run",
        model={"dtype": dtype, "checkpoint": str(parent)},
        budgets=ONLY_FULL,
        stages=ONE_STAGE,
        loss={"kind": kind},
        parallel={"distributed_optimizer": sharded},
    )
    train(recipe)
    first = step_lines(recipe)[0]
    assert first["kd_loss"] == 0.0 and first["loss"] == 0.0 and first["budget"] == "full"
    assert first["grad_norm"] < 1e-5  # softmax rounds


def test_the_teacher_is_frozen_bit_for_bit(
    elastic: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parameters, its buffers and its counters: nothing of it moves while the student trains."""
    seen: list[Any] = []

    def keep(recipe: Recipe, source: Any) -> Any:
        (teacher,) = build_teacher(recipe, source)
        seen.append((teacher, {n: t.clone() for n, t in everything(teacher).items()}))
        return [teacher]

    monkeypatch.setattr(module, "build_teacher", keep)
    train(elastic(tmp_path / "run"))
    ((teacher, before),) = seen
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    for name, value in everything(teacher).items():
        assert torch.equal(value, before[name]), name


def everything(model: Any) -> dict[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def test_the_teacher_starts_as_the_student(elastic: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = elastic(tmp_path / "run")
    source = parent_source(recipe)
    student = build_student(recipe, source, elastic_space(recipe, source.manifest))
    (teacher,) = build_teacher(recipe, source)
    for name, value in teacher.named_parameters():
        assert torch.equal(value, dict(student.chunks[0].named_parameters())[name]), name


def test_distillation_lowers_the_loss_of_every_submodel(
    elastic: Callable[..., Recipe], tmp_path: Path
) -> None:
    stages = [
        {
            "name": "one",
            "tokens": 40 * 8 * 16,
            "seq_length": 16,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "samples_per_draw": 8,
        }
    ]
    budgets = {
        "full": {"metric": "active_params", "target": 1.0},
        "small": {"metric": "active_params", "target": 0.7},
    }
    recipe = elastic(
        tmp_path / "run",
        stages=stages,
        budgets=budgets,
        checkpoint={"interval": 0},
        optimizer={"lr": 3e-3},
        log={"tensorboard": False, "eval_tokens": 64},
    )
    train(recipe)
    small = [line["kd_loss"] for line in step_lines(recipe) if line["budget"] == "small"]
    assert len(small) > 8 and sum(small[-4:]) < 0.7 * sum(small[:4])


def gradients_of_first_step(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Gradients just before the first optimiser step, and the step's line."""
    found: dict[str, Tensor] = {}

    def stop(*args: Any) -> Model:
        model = build_student(*args)
        step = model.optimizer.step

        def record() -> Any:
            found.update({n: p.main_grad.clone() for n, p in model.chunks[0].named_parameters()})
            return step()

        model.optimizer.step = record
        return model

    with monkeypatch.context() as patch:
        patch.setattr(module, "build_student", stop)
        train(recipe)
    return found, step_lines(recipe)[0]


@pytest.mark.parametrize(
    ("budget", "loss"),
    [("medium", {}), ("full", {"ce_weight": 0.5, "temperature": 2.0}), ("medium", {"moe_aux_loss": 0.1})],
    ids=["kl", "kl+ce", "kl+balance"],
)
def test_a_step_does_not_depend_on_micro_batching(
    elastic: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    budget: str,
    loss: dict[str, float],
) -> None:
    """Eight sequences as 1 x 8, 2 x 4 and 4 x 2 under one budget: the same loss, the same gradients."""
    fixed = {
        "tau": {"start": 1e-3, "end": 1e-3},
        "logit_scale": {"start": 1e4, "end": 1e4},
    }  # noise decides nothing
    results = []
    for size in (8, 4, 2):
        stages = [
            {
                **ONE_STAGE[0],
                "tokens": 8 * 16,
                "micro_batch_size": size,
                "samples_per_draw": 8,
                "budget_probs": {budget: 1.0},
            }
        ]
        recipe = elastic(
            tmp_path / f"mbs{size}",
            stages=stages,
            loss=loss,
            router={"inner_size": 16, **fixed},
            optimizer={"lr": 1e-3, "clip_grad": 0.0},
        )
        results.append(gradients_of_first_step(recipe, monkeypatch))
    (whole, line), *others = results
    assert any(g.abs().max() > 1e-6 for g in whole.values())
    for gradients, other in others:
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-6, abs=1e-9)
        assert other["budget"] == line["budget"] == budget
        scale = max(float(g.norm()) for g in whole.values())
        for name, value in whole.items():
            assert float((gradients[name] - value).norm()) <= 1e-6 * max(float(value.norm()), 1e-2 * scale), (
                name
            )


def test_the_frozen_moe_bias_stays_and_the_free_one_moves(
    elastic: Callable[..., Recipe], tmp_path: Path
) -> None:
    from elastic_megatron.checkpoint.source import open_source

    def biases(recipe: Recipe) -> Tensor:
        source = open_source(recipe.run_dir)
        model = build_student(recipe, source, elastic_space(recipe, source.manifest)).chunks[0]
        return model.decoder.layers[1].mlp.router.expert_bias.clone()

    start = None
    for rate in (0.0, 0.01):
        recipe = elastic(tmp_path / f"rate{rate}", loss={"moe_bias_update_rate": rate}, stages=ONE_STAGE)
        source = parent_source(recipe)
        start = build_student(recipe, source, elastic_space(recipe, source.manifest)).chunks[0]
        before = start.decoder.layers[1].mlp.router.expert_bias.clone()
        assert before.any(), "the parent's own bias was trained"
        train(recipe)
        assert torch.equal(biases(recipe), before) == (rate == 0.0)


def test_the_checkpoint_knows_the_family(elastic: Callable[..., Recipe], tmp_path: Path) -> None:
    from elastic_megatron.checkpoint.source import open_source

    recipe = elastic(tmp_path / "run", stages=ONE_STAGE)
    train(recipe)
    manifest = open_source(recipe.run_dir).manifest
    assert set(manifest.submodels) == {"full", "medium", "small"} and manifest.space is not None
    assert manifest.submodels["full"] == manifest.space.full()
    assert [b.name for b in manifest.budgets] == ["full", "medium", "small"]
    for budget in manifest.budgets:
        assert relative_cost(manifest.space, budget, manifest.submodels[budget.name]) > 0


def test_random_weights_are_no_teacher(
    elastic: Callable[..., Recipe], parent_sizes: dict[str, Any], tmp_path: Path
) -> None:
    """They would not even be the student's: the student took the first draw from the generator."""
    with pytest.raises(UserError, match="random weights"):
        train(elastic(tmp_path / "run", model={"dtype": "fp32", "sizes": parent_sizes}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stages": []}, "stages"),
        ({"data": {}}, "data.train"),
        ({"parallel": {"tensor": 2}}, "parallel"),
        ({"parallel": {"distributed_optimizer": False}, "model": {"dtype": "bf16"}}, "distributed_optimizer"),
        ({"model": {"dtype": "fp32", "checkpoint": "nowhere"}}, "nowhere"),
        ({"space": {"choices": {"hidden_size": [99]}}}, "hidden_size"),
        ({"space": {"choices": {"mamba_num_heads": [3]}}}, "mamba_num_heads"),
    ],
)
def test_recipes_that_cannot_run_are_one_line_user_errors(
    elastic: Callable[..., Recipe], parent: Path, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    if "model" in change:
        change = {**change, "model": {"checkpoint": str(parent), **change["model"]}}
    with pytest.raises(UserError) as caught:
        train(elastic(tmp_path / "run", **change))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_teacher_of_another_vocabulary_is_refused(
    write_recipe: Callable[..., Path],
    elastic: Callable[..., Recipe],
    parent_sizes: dict[str, Any],
    tmp_path: Path,
) -> None:
    other = write_recipe(
        tmp_path / "other",
        model={"dtype": "fp32", "sizes": {**parent_sizes, "vocab_size": 300}},
        loss={"kind": "cross_entropy"},
        stages=[{**ONE_STAGE[0], "tokens": 128}],
    )
    train(load(other))
    with pytest.raises(UserError, match="vocabulary"):
        train(elastic(tmp_path / "run", teacher={"checkpoint": str(tmp_path / "other")}))
