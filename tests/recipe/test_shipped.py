"""The recipes of this repository, their schema, and their agreement with `elastic_megatron.space`."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest

from elastic_megatron.recipe import elastic, json_schema, load, model
from elastic_megatron.space import AXIS_NAMES, ElasticSpace, ParentShape
from elastic_megatron.space.budget import METRICS, UNITS

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(path for path in RECIPES.rglob("*.yaml"))
# A file called base.yaml is only part of a recipe.
WHOLE = [path for path in FILES if path.name != "base.yaml"]


def test_there_are_recipes() -> None:
    assert {path.parent.name for path in WHOLE} >= {"tiny_cpu", "nemotron3_nano_30b", "nemotron_nano_v2_12b"}


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: str(path.relative_to(RECIPES)))
def test_shipped_recipe_loads_and_stays_in_the_repository(path: Path) -> None:
    assert load(path).run_dir.is_relative_to(RECIPES.parent)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_shipped_recipe_names_its_schema(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    prefix = "# yaml-language-server: $schema="
    assert first.startswith(prefix)
    assert (path.parent / first.removeprefix(prefix)).resolve() == (RECIPES / "recipe.schema.json").resolve()


def test_schema_file_is_up_to_date() -> None:
    """If not: `elastic-megatron recipe schema > recipes/recipe.schema.json`."""
    assert json.loads((RECIPES / "recipe.schema.json").read_text(encoding="utf-8")) == json_schema()


def test_schema_describes_every_key_and_bounds_numbers() -> None:
    schema = json_schema()
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False and "required" not in section
        for key, value in section["properties"].items():
            assert value.get("description") or "$ref" in value, key
    assert "extends" in schema["properties"]
    assert schema["$defs"]["Stage"]["properties"]["tokens"]["exclusiveMinimum"] == 0


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: str(path.relative_to(RECIPES)))
def test_shipped_widths_are_legal(path: Path) -> None:
    recipe = load(path)
    sizes = recipe.model.sizes or load(path.parent / "parent.yaml").model.sizes
    assert sizes is not None
    space = recipe.space
    parent = ParentShape(**sizes.model_dump())
    built = ElasticSpace.build(parent, space.choices, space.lanes, space.granule, space.per_layer)
    assert set(built.axes) == set(space.choices)


def test_nano_30b_is_the_published_model() -> None:
    sizes = load(RECIPES / "nemotron3_nano_30b/plan.yaml").model.sizes
    assert sizes is not None
    pattern = sizes.hybrid_layer_pattern
    assert [pattern.count(symbol) for symbol in "ME*"] == [23, 23, 6]
    assert [index for index, symbol in enumerate(pattern) if symbol == "*"] == [5, 12, 19, 26, 33, 42]


def test_nano_v2_12b_is_the_published_model() -> None:
    sizes = load(RECIPES / "nemotron_nano_v2_12b/plan.yaml").model.sizes
    assert sizes is not None
    assert [sizes.hybrid_layer_pattern.count(symbol) for symbol in "M-*"] == [28, 28, 6]


def test_names_agree_with_the_space() -> None:
    axes = json_schema()["$defs"]["Space"]["properties"]["choices"]["propertyNames"]["enum"]
    assert set(axes) == set(AXIS_NAMES)
    assert set(model.Sizes.model_fields) == {field.name for field in dataclasses.fields(ParentShape)}
    members = get_args(get_args(elastic.Budget)[0])
    metrics = [metric for member in members for metric in get_args(member.model_fields["metric"].annotation)]
    assert sorted(metrics) == sorted(METRICS)
    assert get_args(elastic.BudgetBase.model_fields["unit"].annotation) == UNITS
