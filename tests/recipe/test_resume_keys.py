"""Every key of a recipe either may change from one start of a run to the next, or decides its training."""

from __future__ import annotations

from pathlib import Path

import pytest
from leaf_fields import leaf_fields
from test_readers import RECIPE

from elastic_megatron.recipe import Recipe, load
from elastic_megatron.recipe.resume import DECIDES, MAY_CHANGE, forbidden, may_change


def begins(key: str, prefix: str) -> bool:
    return key == prefix or (key.removeprefix(prefix)[:1] in (".", "[", "{", "<") and key.startswith(prefix))


def test_every_key_is_in_one_of_the_tables_and_every_row_is_of_a_key() -> None:
    """By the longest row that begins it; no row says both."""
    keys = list(leaf_fields(Recipe))
    rows = [*MAY_CHANGE, *DECIDES]
    assert len(rows) == len({*rows})
    for key in keys:
        found = [row for row in rows if begins(key, row)]
        assert found, f"{key}: may it change on resume? say so in recipe/resume.py"
        assert may_change(key) == (max(found, key=len) in MAY_CHANGE), key
    for row in rows:
        assert any(begins(key, row) for key in keys), row


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=7", "seed"),
        ("optimizer.lr=5e-3", "optimizer.lr"),
        ("stages.1.lr=5e-3", "stages.1.lr"),
        ("stages.0.global_batch_size=4", "stages.0.global_batch_size"),
        ("stages.0.micro_batch_size=4", "stages.0.samples_per_draw"),
        ("data.train.0.weight=3", "data.train"),
        ("space.choices.hidden_size=[8, 16]", "space.choices.hidden_size"),
        ("budgets.small.target=0.5", "budgets.small.target"),
        ("loss.temperature=2", "loss.temperature"),
        ("parallel.distributed_optimizer=false", "parallel.distributed_optimizer"),
        ("model.dtype=bf16", "model.dtype"),
        (
            "stages=[{name: one, tokens: 192, seq_length: 8, global_batch_size: 8, micro_batch_size: 2}]",
            "stages",
        ),
        ("loss.on_divergence=rewind", None),
        ("parallel.pipeline=2", None),
        ("checkpoint.interval=5", None),
        ("data.cache=elsewhere", None),
        ("data.valid=[]", None),
        ("log.eval_tokens=32", None),
        ("stop_after=one", None),
        ("run_dir=moved", None),
        ("stages.0.execution=masked", None),
        ("slurm.time=0:10:00", None),
    ],
)
def test_a_change_is_named_by_its_key(recipe_file: Path, override: str, key: str | None) -> None:
    found = forbidden(load(recipe_file), load(recipe_file, [override]))
    assert [changed.key for changed in found] == ([] if key is None else [key])


def test_stages_may_be_added_and_cut_otherwise(recipe_file: Path) -> None:
    """Without budgets nothing is drawn, so that micro-batches are but a cut of the same batch."""
    before = load(recipe_file)
    more = "stages=[" + ", ".join(
        f"{{name: {s.name}, tokens: {s.tokens}, seq_length: 8, global_batch_size: {s.global_batch_size}, "
        "micro_batch_size: 2}"
        for s in before.stages
    )
    added = f"{more}, {{name: three, tokens: 64, seq_length: 8, global_batch_size: 4, micro_batch_size: 2, lr: 1e-4}}]"
    assert not list(forbidden(before, load(recipe_file, [added])))
    assert [changed.key for changed in forbidden(load(recipe_file, [added]), before)] == ["stages"]
    plain = ["budgets=", "loss.kind=cross_entropy"]
    cut = load(recipe_file, [*plain, "stages.0.micro_batch_size=1"])
    assert not list(forbidden(load(recipe_file, plain), cut))
