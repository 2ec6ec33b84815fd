"""What is not finite gives no update, is never saved and prunes nothing; a run that diverges ends or goes back."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_state import assert_same_state, crash_before, lines
from torch import Tensor

from elastic_megatron.checkpoint import tracker
from elastic_megatron.errors import DIVERGED, DivergedError, UserError
from elastic_megatron.recipe import Recipe
from elastic_megatron.report import write_report
from elastic_megatron.training import step as forward
from elastic_megatron.training import train as module
from elastic_megatron.training.divergence import DivergenceWatch
from elastic_megatron.training.step import ForwardStep
from elastic_megatron.training.train import train

pytestmark = pytest.mark.usefixtures("megatron")


@contextmanager
def spoiled(steps: Collection[int], what: str, value: float = float("nan")) -> Iterator[None]:
    """In these steps (0-based) a number of every micro-batch is ``value``: in its log, its loss or its gradient."""
    original = ForwardStep._loss

    def loss(self: Any, batch: Any, *arguments: Any) -> Any:
        total, counted, sums = original(self, batch, *arguments)
        if batch.step in steps:
            if what == "gradient":
                total.register_hook(lambda gradient: gradient * value)
            elif what == "loss":
                total, sums = total * value, sums | {"loss": sums["loss"] * value}
            else:
                sums = sums | {what: sums[what] * value}
        return total, counted, sums

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForwardStep, "_loss", loss)
        yield


@contextmanager
def passing_over(steps: Collection[int]) -> Iterator[None]:
    """The oracle: a run that never sees these steps."""
    original = DivergenceWatch.__init__

    def begin(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        self.skipped |= {*steps}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DivergenceWatch, "__init__", begin)
        yield


def strict(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics as a strict reader of JSON takes them."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    texts = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(text, parse_constant=refuse) for text in texts]


def steps_of(run_dir: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in strict(run_dir) if "loss" in line}


@pytest.fixture(scope="module")
def without_step_3(elastic: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    recipe = elastic(tmp_path_factory.mktemp("oracle") / "run")
    with passing_over({2}):
        train(recipe)
    return recipe


@pytest.mark.parametrize(
    ("what", "value", "named"),
    [
        ("loss", float("nan"), "loss"),
        ("kd_loss", float("inf"), "kd_loss"),
        ("router_loss", float("-inf"), "router_loss"),
        ("gradient", float("nan"), "grad_norm"),
        ("gradient", float("inf"), "grad_norm"),
    ],
)
def test_a_step_that_is_not_finite_gives_no_update_and_says_so(
    elastic: Callable[..., Recipe],
    without_step_3: Recipe,
    tmp_path: Path,
    what: str,
    value: float,
    named: str,
) -> None:
    """The run ends, bit for bit, as one that passed over the step; step 3 was due to be saved, step 4 is."""
    recipe = elastic(tmp_path / "run")
    with spoiled({2}, what, value):
        assert train(recipe).step == 6
    assert_same_state(recipe, without_step_3)
    found = steps_of(recipe.run_dir)
    assert [step for step, line in found.items() if not line["updated"]] == [3]
    assert [step for step, line in found.items() if line.get("skipped")] == [3]
    assert named in found[3]["nonfinite"] and found[3][named] is None
    assert [line["tokens"] for line in found.values()] == [128, 256, 256, 384, 512, 640]
    names = [p.name for p in tracker.complete(recipe.run_dir / "checkpoints")]
    assert names == ["iter_0000004", "iter_0000006"]


@pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])
def test_a_run_that_diverges_stops_and_keeps_what_was_good(
    elastic: Callable[..., Recipe], tmp_path: Path, async_save: bool
) -> None:
    """Every step would be saved and prune all before: what stays is the last one whose step was finite."""
    checkpoint = {"interval": 1, "keep_last": 1, "async_save": async_save}
    recipe = elastic(tmp_path / "run", checkpoint=checkpoint, loss={"divergence_patience": 2})
    with spoiled(range(2, 6), "loss"), pytest.raises(DivergedError) as caught:
        train(recipe)
    root = recipe.run_dir / "checkpoints"
    assert [p.name for p in root.iterdir() if p.name.startswith("iter")] == ["iter_0000002"]
    assert tracker.newest(root) == root / "iter_0000002"
    said = str(caught.value)
    assert caught.value.status == DIVERGED and "\n" not in said and str(root / "iter_0000002") in said
    assert "steps 3 to 4" in said
    assert list(steps_of(recipe.run_dir)) == [1, 2, 3, 4]
    # and from there the run goes on, once its samples do no harm
    assert train(recipe).step == 6


def test_the_last_step_of_all_is_never_left_unsaved_in_silence(
    elastic: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = elastic(tmp_path / "run")
    with spoiled({5}, "loss"), pytest.raises(DivergedError, match="step 6 not finite"):
        train(recipe)
    newest = tracker.newest(recipe.run_dir / "checkpoints")
    assert newest is not None and newest.name == "iter_0000003"


@pytest.mark.parametrize("killed", [None, 5], ids=["alive", "killed afterwards"])
def test_rewinding_is_the_run_without_the_offending_samples(
    elastic: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: int | None
) -> None:
    """Weights, optimizer, losses and tokens, also where the run is killed after it and resumed without the cause."""
    stages = [
        {
            "name": "long",
            "tokens": 7 * 4 * 16,
            "seq_length": 16,
            "global_batch_size": 4,
            "micro_batch_size": 2,
        }
    ]
    loss = {"divergence_patience": 2, "on_divergence": "rewind", "moe_bias_update_rate": 0.01}
    settings = {"stages": stages, "checkpoint": {"interval": 2, "keep_last": 4}, "loss": loss}
    straight, recipe = elastic(tmp_path / "straight", **settings), elastic(tmp_path / "run", **settings)
    with passing_over({2, 3}):
        train(straight)
    with spoiled({2, 3}, "gradient"):
        if killed is not None:
            crash_before(recipe, killed, monkeypatch)
    with spoiled({2, 3} if killed is None else (), "gradient"):
        assert train(recipe).step == 7
    assert_same_state(recipe, straight)
    found = [line for line in lines(recipe.run_dir) if "rewind" not in line]
    assert found == lines(straight.run_dir)
    told = [line["rewind"] for line in strict(recipe.run_dir) if "rewind" in line]
    assert [(r["step"], r["passed_over"], r["rewinds"]) for r in told] == [(2, [3, 4], 1)]
    assert steps_of(recipe.run_dir)[7]["tokens"] == 5 * 4 * 16


def test_rewinds_come_to_an_end(elastic: Callable[..., Recipe], tmp_path: Path) -> None:
    loss = {"divergence_patience": 1, "on_divergence": "rewind", "max_rewinds": 2}
    recipe = elastic(tmp_path / "run", loss=loss)
    with spoiled({3, 4, 5}, "loss"), pytest.raises(DivergedError, match="loss.max_rewinds=2 are used up"):
        train(recipe)
    told = [line["rewind"] for line in strict(recipe.run_dir) if "rewind" in line]
    assert [r["passed_over"] for r in told] == [[4], [5]]
    newest = tracker.newest(recipe.run_dir / "checkpoints")
    assert newest is not None and newest.name == "iter_0000003"


@pytest.mark.parametrize("on_divergence", ["stop", "rewind"])
def test_weights_that_are_not_finite_are_never_saved(
    elastic: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_divergence: str
) -> None:
    """Every loss and gradient was finite; the update of step 4 was not."""
    recipe = elastic(
        tmp_path / "run",
        checkpoint={"interval": 1, "keep_last": 1},
        loss={"on_divergence": on_divergence},
    )
    one_step = module._Run._one_step

    def overflow(self: Any, step: int, lr: float) -> Any:
        asked = one_step(self, step, lr)
        if step == 3:
            parameter = next(p for p in self.model.chunks[0].parameters() if p.ndim == 2)
            with torch.no_grad():
                parameter[0, 0] = float("inf")
        return asked

    monkeypatch.setattr(module._Run, "_one_step", overflow)
    if on_divergence == "stop":
        with pytest.raises(DivergedError, match="is not finite: .*weight has NaN or infinite values"):
            train(recipe)
        names = ["iter_0000003"]
    else:
        assert train(recipe).step == 6
        assert not steps_of(recipe.run_dir)[4]["updated"]
        names = ["iter_0000006"]
    assert [p.name for p in tracker.complete(recipe.run_dir / "checkpoints")] == names


@pytest.mark.parametrize("sampling", ["soft", "hard"])
@pytest.mark.parametrize("where", ["router", "gumbel noise", "budget loss", "weights"])
def test_no_nan_of_the_elastic_path_ends_in_another_error(
    elastic: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sampling: str,
    where: str,
) -> None:
    """Evaluation and report among it: at every step one is due."""
    log = {"tensorboard": True, "eval_tokens": 64, "eval_interval": 1, "interval": 1}
    recipe = elastic(tmp_path / "run", router={"inner_size": 16, "sampling": sampling}, log=log)
    one_step, cost = module._Run._one_step, forward.budget_loss

    def poison(tensor: Tensor) -> None:
        with torch.no_grad():
            tensor.fill_(float("nan"))

    def spoil(self: Any, step: int, lr: float) -> Any:
        if step == 1 and where == "router":
            poison(next(self.model.router.parameters()))
        if step == 1 and where == "weights":
            poison(next(p for p in self.model.chunks[0].parameters() if p.ndim == 2))
        return one_step(self, step, lr)

    monkeypatch.setattr(module._Run, "_one_step", spoil)
    if where == "gumbel noise":
        monkeypatch.setattr(
            "elastic_megatron.router.router.gumbel_noise", lambda _, like: torch.full_like(like, float("nan"))
        )
    if where == "budget loss":
        monkeypatch.setattr(
            forward, "budget_loss", lambda *a, **k: tuple(v * float("nan") for v in cost(*a, **k))
        )
    with pytest.raises(DivergedError):
        train(recipe)
    assert tracker.newest(recipe.run_dir / "checkpoints") is None
    assert [line.get("nonfinite") is None for line in steps_of(recipe.run_dir).values()].count(True) <= 1
    if where == "router":  # of logits that are not finite nothing is the most probable
        assert [line["router"]["step"] for line in strict(recipe.run_dir) if "router" in line] == [1]
    write_report(recipe.run_dir)


def test_a_parent_or_teacher_that_is_not_finite_is_refused_by_the_name_of_its_tensor(
    elastic: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_source = module.parent_source

    def broken(recipe: Recipe) -> Any:
        source = open_source(recipe)

        def spoiled_fill(chunks: Any) -> None:
            source.fill(chunks)
            with torch.no_grad():
                chunks[0].decoder.layers[0].mixer.D[0] = float("nan")

        return replace(source, fill=spoiled_fill)

    monkeypatch.setattr(module, "parent_source", broken)
    recipe = elastic(tmp_path / "run")
    with pytest.raises(UserError, match="decoder.layers.0.mixer.D has NaN or infinite values") as caught:
        train(recipe)
    assert not isinstance(caught.value, DivergedError) and "\n" not in str(caught.value)
