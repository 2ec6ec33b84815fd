"""What the teacher said is kept: later runs ask nobody, and learn the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_runs import recipe_of, save_family
from run_state import assert_same_state, crash_before, lines
from torch import Tensor

from elastic_megatron.data.record_files import listing
from elastic_megatron.errors import UserError
from elastic_megatron.recipe import Recipe, load
from elastic_megatron.training import train as module
from elastic_megatron.training.build import build_teacher
from elastic_megatron.training.step import ForwardStep
from elastic_megatron.training.train import train

pytestmark = pytest.mark.usefixtures("megatron")
ONE_STAGE = [
    {"name": "one", "tokens": 3 * 8 * 16, "seq_length": 16, "global_batch_size": 8, "micro_batch_size": 4}
]
Make = Callable[..., Recipe]


def steps_of(recipe: Recipe) -> list[dict[str, Any]]:
    return [line for line in lines(recipe.run_dir) if "loss" in line]


@contextmanager
def counted() -> Iterator[list[int]]:
    """How often the teacher runs to train, as ``[calls]``; evaluation is left out."""
    calls = [0]

    def count(recipe: Recipe, source: Any) -> Any:
        chunks = build_teacher(recipe, source)
        for chunk in chunks:
            chunk.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        return chunks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "build_teacher", count)
        yield calls


def cached(elastic: Make, run_dir: Path, cache: Path, **sections: Any) -> Recipe:
    teacher = {"cache": str(cache), "top_k": 8, **sections.pop("teacher", {})}
    return elastic(run_dir, teacher=teacher, **sections)


@pytest.fixture(scope="module")
def filled(elastic: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """A run of two stages that was first to ask, and its cache."""
    folder = tmp_path_factory.mktemp("filled")
    recipe = cached(elastic, folder / "run", folder / "cache")
    with counted() as calls:
        train(recipe)
    assert calls == [4 * 2 + 2 * 2]
    return recipe, folder / "cache"


def test_a_second_run_asks_nothing_and_ends_with_the_same_bits(
    filled: tuple[Recipe, Path], elastic: Make, tmp_path: Path
) -> None:
    first, cache = filled
    second = cached(elastic, tmp_path / "run", cache)
    with counted() as calls:
        train(second)
    assert calls == [0]
    assert steps_of(second) == steps_of(first)
    assert_same_state(second, first)
    assert len(records(cache)) == 4 * 8 + 2 * 4, "what is known is not written again"


def records(cache: Path) -> list[bytes]:
    return [keys[i : i + 16] for _, keys in listing(cache).values() for i in range(0, len(keys), 16)]


def test_without_a_teacher_in_memory_it_is_the_same_run(
    filled: tuple[Recipe, Path], elastic: Make, tmp_path: Path
) -> None:
    first, cache = filled
    second = cached(elastic, tmp_path / "run", cache, teacher={"cache_only": True})
    with counted() as calls:
        train(second)
    assert calls == [0] and steps_of(second) == steps_of(first)
    assert_same_state(second, first)


def test_micro_batches_may_be_others(filled: tuple[Recipe, Path], elastic: Make, tmp_path: Path) -> None:
    """A record is one sequence's, however sequences were put together."""
    _, cache = filled
    stages = [{**ONE_STAGE[0], "tokens": 4 * 8 * 16, "micro_batch_size": 2, "samples_per_draw": 4}]
    second = cached(elastic, tmp_path / "run", cache, stages=stages, teacher={"cache_only": True})
    train(second)
    assert len(steps_of(second)) == 4


def test_several_budgets_share_what_was_said(elastic: Make, tmp_path: Path) -> None:
    stages = [{**ONE_STAGE[0], "budgets_per_batch": 2}]
    runs = []
    for name in ("first", "second"):
        runs.append(cached(elastic, tmp_path / name, tmp_path / "cache", stages=stages))
        with counted() as calls:
            train(runs[-1])
        assert calls == [6 if name == "first" else 0]
    assert steps_of(runs[0]) == steps_of(runs[1])


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("more", [{}, {"temperature": 2.0, "ce_weight": 0.3}], ids=["kl", "kl+ce"])
def test_losses_are_those_of_a_teacher_reduced_to_k_plus_one_outcomes(
    elastic: Make, tmp_path: Path, kind: str, more: dict[str, float]
) -> None:
    """Dense, from whole logits of both."""
    recipe = cached(
        elastic, tmp_path / "run", tmp_path / "cache", stages=ONE_STAGE, loss={"kind": kind, **more}
    )
    slow: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ForwardStep, "_loss", spying(slow, patch, recipe))
        train(recipe)
    expected = [float(sum(slow[i : i + 2])) / 128 for i in range(0, len(slow), 2)]
    found = [line["kd_loss"] for line in steps_of(recipe)]
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-8) and len(found) == 3
    assert max(found) > 1e-5


def spying(slow: list[Tensor], patch: pytest.MonkeyPatch, recipe: Recipe) -> Any:
    """As ``ForwardStep._loss``, noting the divergence of the batch from whole logits of teacher and student."""
    from elastic_megatron.training.teacher_cache import Lesson

    noted, said, loss = Lesson.noted, [], ForwardStep._loss
    patch.setattr(Lesson, "noted", lambda self, teacher: (said.append(teacher), noted(self, teacher))[1])

    def look(self: ForwardStep, batch: Any, reference: Any, router_loss: Any, student: Any) -> Any:
        how, k = recipe.loss, recipe.teacher.top_k
        teacher = said.pop(0)
        log_p, log_q = (
            (p.hidden @ p.weight.T / how.temperature).detach().double().log_softmax(-1)
            for p in (teacher, student)
        )
        top = log_p.topk(k).indices
        others = torch.ones_like(log_p, dtype=torch.bool).scatter(-1, top, False)
        p, q = (
            torch.cat([x.gather(-1, top), x.masked_fill(~others, -torch.inf).logsumexp(-1, True)], -1)
            for x in (log_p, log_q)
        )
        ahead, behind = (p, q) if how.kind == "forward_kl" else (q, p)
        slow.append((ahead.exp() * (ahead - behind)).sum() * batch.weight)
        return loss(self, batch, reference, router_loss, student)

    return look


def test_all_entries_are_the_whole_divergence(elastic: Make, tmp_path: Path) -> None:
    """``top_k`` is at most the vocabulary."""
    stages = [{**ONE_STAGE[0], "budget_probs": {"medium": 1.0}}]
    # a larger eps: Adam would make a step of what rounding does to gradients that are nearly zero
    sections: dict[str, Any] = {"stages": stages, "optimizer": {"lr": 1e-3, "eps": 1e-4}}
    whole = elastic(tmp_path / "whole", **sections)
    top = cached(elastic, tmp_path / "top", tmp_path / "cache", **sections, teacher={"top_k": 10**6})
    for recipe in (whole, top):
        train(recipe)
    for mine, theirs in zip(steps_of(top), steps_of(whole), strict=True):
        assert mine["kd_loss"] == pytest.approx(theirs["kd_loss"], rel=1e-3)
    assert json.loads((tmp_path / "cache" / "teacher.json").read_text())["top_k"] == 264


@pytest.mark.parametrize("crash_at", [3, 5])
def test_a_run_that_died_goes_on_exactly(
    filled: tuple[Recipe, Path],
    elastic: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crash_at: int,
) -> None:
    """Steps after the last checkpoint are taken again: now their sequences are known, and it makes no difference."""
    straight, _ = filled
    recipe = cached(elastic, tmp_path / "run", tmp_path / "cache")
    crash_before(recipe, crash_at, monkeypatch)
    torch.manual_seed(999)
    with counted() as calls:
        train(recipe)
    assert calls == [2 * (6 - crash_at)]
    assert lines(recipe.run_dir) == lines(straight.run_dir)
    assert_same_state(recipe, straight)


@pytest.mark.parametrize("harm", ["cut short", "changed"])
def test_a_damaged_record_is_asked_for_again(
    filled: tuple[Recipe, Path], elastic: Make, tmp_path: Path, harm: str
) -> None:
    straight, original = filled
    cache = tmp_path / "cache"
    shutil.copytree(original, cache)
    (path, size) = next((p, p.stat().st_size) for p in sorted(cache.glob("*.records")))
    with path.open("r+b") as file:
        if harm == "cut short":
            file.truncate(size - 5)
        else:
            file.seek(size - 200)
            file.write(bytes(byte ^ 1 for byte in path.read_bytes()[size - 200 : size - 199]))
    recipe = cached(elastic, tmp_path / "run", cache)
    with counted() as calls:
        train(recipe)
    assert calls == [1]
    assert steps_of(recipe) == steps_of(straight)
    assert len(records(cache)) == 40 + (harm == "changed"), "its neighbours in the micro-batch were known"
    again = cached(elastic, tmp_path / "again", cache, teacher={"cache_only": True})
    train(again)
    assert steps_of(again) == steps_of(straight)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"teacher": {"top_k": 9}}, "top_k 8, but this run has 9"),
        ({"loss": {"temperature": 2.0}}, "temperature 1.0, but this run has 2.0"),
        ({"model": "other"}, "of teacher"),
    ],
    ids=["k", "temperature", "teacher"],
)
def test_a_cache_of_something_else_is_refused(
    filled: tuple[Recipe, Path],
    elastic: Make,
    parent: Path,
    tmp_path: Path,
    change: dict[str, Any],
    says: str,
) -> None:
    first, cache = filled
    if "model" in change:
        change = {"model": {"dtype": "fp32", "checkpoint": str(first.run_dir)}}
    with pytest.raises(UserError, match=says) as error:
        train(cached(elastic, tmp_path / "run", cache, stages=ONE_STAGE, **change))
    assert "name another folder" in str(error.value) and "\n" not in str(error.value)


def test_sequences_that_are_not_there_are_told_before_the_first_step(
    filled: tuple[Recipe, Path], elastic: Make, tmp_path: Path
) -> None:
    _, cache = filled
    recipe = cached(elastic, tmp_path / "run", cache, seed=5, stages=ONE_STAGE, teacher={"cache_only": True})
    with pytest.raises(UserError, match=r"lacks \d+ of the 24 sequences ahead.*cache_only=false") as error:
        train(recipe)
    assert "\n" not in str(error.value) and not steps_of(recipe)


def test_a_full_disk_ends_the_writing_and_not_the_run(
    filled: tuple[Recipe, Path],
    elastic: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from elastic_megatron.data.record_files import Records

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Records, "append", full)
    recipe = cached(elastic, tmp_path / "run", tmp_path / "cache")
    train(recipe)
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert steps_of(recipe) == steps_of(filled[0])


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"teacher": {"cache_only": True}}, "needs teacher.cache"),
        ({"teacher": {"cache": "x"}, "loss": {"kind": "cross_entropy"}}, "has no effect"),
    ],
)
def test_keys_that_contradict_are_refused(
    recipe_file: Callable[..., Path], tmp_path: Path, sections: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        load(recipe_file(tmp_path / "run", **sections))


def test_distillation_of_a_quantised_family_needs_no_teacher_either(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Nor does calibration; both then report losses, and no divergence from a teacher that is not there."""
    family, evals = save_family(tmp_path / "family"), []
    teacher = {"cache": str(tmp_path / "cache"), "top_k": 8}
    runs = [
        recipe_of(write_recipe, tmp_path / f"only_{only}", family, teacher={**teacher, "cache_only": only})
        for only in (False, True)
    ]
    for recipe in runs:
        train(recipe)
        evals.append([line["eval"]["submodels"] for line in lines(recipe.run_dir) if "eval" in line])
    assert steps_of(runs[1]) == steps_of(runs[0]) != []
    assert len(evals[0]) == len(evals[1]) > 2
    for there, not_there in zip(*evals, strict=True):
        for name, result in there.items():
            assert "kl" in result and {k: v for k, v in result.items() if k != "kl"} == not_there[name]
