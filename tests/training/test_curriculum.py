"""The curriculum is a pure function of the step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elastic_megatron.recipe import Recipe, load
from elastic_megatron.recipe.training import Optimizer
from elastic_megatron.training.curriculum import Curriculum, LearningRate


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes without a parent: nothing is trained here."""

    def make(**sections: Any) -> Recipe:
        budgets = {
            n: {"metric": "active_params", "target": t}
            for n, t in (("full", 1.0), ("medium", 0.8), ("small", 0.6))
        }
        defaults = {
            "model": {"hf": "nowhere"},
            "budgets": budgets,
            "space": {"choices": {"hidden_size": [16]}},
        }
        return load(write_recipe(tmp_path / "run", **(defaults | sections)))

    return make


def stage(name: str, steps: int, length: int = 16, batch: int = 8, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "tokens": steps * length * batch,
        "seq_length": length,
        "global_batch_size": batch,
        **more,
    }


def test_places_count_samples_and_tokens(recipe: Callable[..., Recipe]) -> None:
    curriculum = Curriculum(recipe(stages=[stage("a", 3), stage("b", 2, 32, 4)]))
    assert curriculum.total_steps == 5
    found = [
        (p.stage.name, p.stage_index, p.step_in_stage, p.samples, p.tokens)
        for p in map(curriculum.place, range(5))
    ]
    assert found == [
        ("a", 0, 0, 0, 0),
        ("a", 0, 1, 8, 128),
        ("a", 0, 2, 16, 256),
        ("b", 1, 0, 0, 384),
        ("b", 1, 1, 4, 512),
    ]
    assert [curriculum.tokens_after(n) for n in range(6)] == [0, 128, 256, 384, 512, 640]
    with pytest.raises(IndexError):
        curriculum.place(5)


def test_the_last_step_of_a_stage_is_whole(recipe: Callable[..., Recipe]) -> None:
    odd = {**stage("a", 1), "tokens": 129}
    assert Curriculum(recipe(stages=[odd])).total_steps == 2


def test_places_depend_on_nothing_but_the_step(recipe: Callable[..., Recipe]) -> None:
    stages = [stage("a", 3), stage("b", 2, 32, 4)]
    one, other = Curriculum(recipe(stages=stages)), Curriculum(recipe(stages=stages))
    forwards = [one.place(s) for s in range(5)]
    assert [other.place(s) for s in reversed(range(5))][::-1] == forwards


def first_drawn(curriculum: Curriculum, step: int, unit: int = 0) -> str:
    ((budget, weight),) = curriculum.draw_budgets(curriculum.place(step), unit)
    assert weight == 1
    return budget


def test_budget_draws_are_functions_of_seed_step_and_unit(recipe: Callable[..., Recipe]) -> None:
    def draws(seed: int) -> list[list[str]]:
        c = Curriculum(recipe(stages=[stage("a", 40)], seed=seed))
        return [[first_drawn(c, s, unit) for s in range(40)] for unit in range(3)]

    assert draws(1) == draws(1) != draws(2)
    one, other, third = draws(1)
    assert one != other != third != one and {*one} == {"full", "medium", "small"}


@pytest.mark.parametrize(("micro", "per_draw"), [(1, None), (1, 4), (2, 2), (2, 6), (4, 12)])
def test_the_draw_of_a_sample_depends_on_neither_micro_batches_nor_ranks(
    recipe: Callable[..., Recipe], micro: int, per_draw: int | None
) -> None:
    more = {} if per_draw is None else {"samples_per_draw": per_draw}
    c = Curriculum(recipe(stages=[stage("a", 2, batch=12, micro_batch_size=micro, **more)]))
    size = per_draw or micro
    for place in (c.place(0), c.place(1)):
        units = [c.unit(place, sample) for sample in range(12)]
        assert units == [sample // size for sample in range(12)]


def test_budget_draws_have_the_stages_frequencies(recipe: Callable[..., Recipe]) -> None:
    probs = {"full": 0.5, "small": 0.5}
    c = Curriculum(recipe(stages=[stage("a", 2000), stage("b", 2000, budget_probs=probs)]))
    first, second = ([first_drawn(c, s) for s in steps] for steps in (range(2000), range(2000, 4000)))
    for name in ("full", "medium", "small"):
        assert abs(first.count(name) / 2000 - 1 / 3) < 0.05
    assert second.count("medium") == 0 and abs(second.count("full") / 2000 - 0.5) < 0.05


def test_several_budgets_of_a_batch_differ_and_keep_the_expectation_of_one(
    recipe: Callable[..., Recipe],
) -> None:
    probs = {"full": 0.6, "medium": 0.3, "small": 0.1}
    c = Curriculum(recipe(stages=[stage("a", 4000, budget_probs=probs, budgets_per_batch=2)]))
    total = dict.fromkeys(probs, 0.0)
    for step in range(4000):
        drawn = c.draw_budgets(c.place(step), 0)
        assert len({budget for budget, _ in drawn}) == 2
        for budget, weight in drawn:
            total[budget] += weight
    for budget, p in probs.items():
        assert total[budget] / 4000 == pytest.approx(p, abs=0.03)


class Groups:
    """A Megatron optimizer as far as a scheduler sees it: a model's group and the router's."""

    def __init__(self, lr: float) -> None:
        self.param_groups = [
            {"default_config": True, "lr": 0.0, "max_lr": lr, "min_lr": 0.0, "wd_mult": 1.0, "lr_mult": 1.0},
            {
                "default_config": False,
                "lr": 0.0,
                "max_lr": 10 * lr,
                "min_lr": 0.0,
                "wd_mult": 0.0,
                "lr_mult": 1.0,
            },
        ]


SCHEDULES = {
    "cosine": {"schedule": "cosine", "warmup_steps": 3},
    "linear": {"schedule": "linear"},
    "constant": {"schedule": "constant", "warmup_steps": 2},
    "wsd": {"schedule": "wsd", "warmup_steps": 1, "wsd_decay_fraction": 0.5},
}
STAGES = [stage("a", 6), stage("b", 4), stage("c", 5, lr=5e-4)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_are_functions_of_the_step(recipe: Callable[..., Recipe], name: str) -> None:
    """In order, or starting anywhere, as after a resume: the same rates for model and router."""
    settings = Optimizer(lr=1e-3, **SCHEDULES[name])
    curriculum = Curriculum(recipe(stages=STAGES))

    def rates(steps: range) -> list[tuple[float, float]]:
        groups = Groups(settings.lr)
        schedule, out = LearningRate(groups, settings, curriculum), []
        for s in steps:
            assert schedule.set(s) == groups.param_groups[0]["lr"]
            out.append((groups.param_groups[0]["lr"], groups.param_groups[1]["lr"]))
        return out

    whole = rates(range(15))
    for start in (1, 4, 7, 10, 12, 14):
        assert np.allclose(rates(range(start, 15)), whole[start:], rtol=1e-12, atol=1e-18)
    # the last step of each of the two schedules has their end, min_lr = 0
    assert all(rate > 0 for s, (rate, _) in enumerate(whole) if s not in (9, 14))


def test_a_stage_with_its_own_rate_begins_its_own_schedule(recipe: Callable[..., Recipe]) -> None:
    curriculum = Curriculum(recipe(stages=STAGES))
    assert [(s.start, s.steps, s.peak_lr) for s in curriculum.segments()] == [(0, 10, 1e-3), (10, 5, 5e-4)]
    groups = Groups(1e-3)
    schedule = LearningRate(groups, Optimizer(lr=1e-3, schedule="constant"), curriculum)
    assert [schedule.set(s) for s in (0, 9, 10, 14)] == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4])


def test_warm_up_is_linear_from_the_first_step(recipe: Callable[..., Recipe]) -> None:
    curriculum = Curriculum(recipe(stages=STAGES))
    schedule = LearningRate(Groups(1e-3), Optimizer(lr=1e-3, schedule="constant", warmup_steps=4), curriculum)
    assert [schedule.set(s) for s in range(6)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
