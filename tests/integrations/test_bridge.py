"""The stack spec for Megatron-Bridge: what it takes, what it returns, what survives its YAML."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_shape import config
from tiny_models import SIZES, SPACE

from elastic_megatron import runtime
from elastic_megatron.blocks import ElasticHybridStack
from elastic_megatron.checkpoint.manifest import FILE, Manifest
from elastic_megatron.errors import UserError
from elastic_megatron.integrations.bridge import hybrid_stack_spec
from elastic_megatron.space import ElasticSpace, ParentShape


@pytest.fixture
def space() -> ElasticSpace:
    return ElasticSpace.build(ParentShape.from_dict(SIZES), **SPACE)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"name": "tiny", "run_dir": "run", "model": {"sizes": SIZES}, "space": SPACE}))
    return file


def test_a_provider_calls_it_with_itself(space: ElasticSpace) -> None:
    """Bridge passes the provider to a callable that has parameters left, counting as here."""
    left = inspect.signature(hybrid_stack_spec(space)).parameters.values()
    assert [p.name for p in left if p.default is p.empty] == ["provider"]


def test_a_model_built_with_it_has_the_elastic_stack(megatron: Any, space: ElasticSpace) -> None:
    from megatron.training.models import HybridModelBuilder

    provider = config()
    provider.hybrid_stack_spec = hybrid_stack_spec(space)(provider)
    model = HybridModelBuilder(provider).build_model(runtime.groups())
    assert type(model.decoder) is ElasticHybridStack and model.decoder.space == space


def test_recipe_checkpoint_and_space_mean_the_same(space: ElasticSpace, recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000007"
    folder.mkdir()
    Manifest(shape=space.parent, space=space).write(folder / FILE)
    for source in (recipe, str(recipe), folder):
        assert hybrid_stack_spec(source).keywords == hybrid_stack_spec(space).keywords, source


def test_it_survives_pickling_and_the_yaml_of_configs(space: ElasticSpace) -> None:
    """Megatron's YAML keeps the dotted name and the arguments of a partial."""
    from megatron.training.config.yaml_utils import safe_yaml_representers

    spec = hybrid_stack_spec(space)
    copy = pickle.loads(pickle.dumps(spec))
    assert (copy.func, copy.keywords) == (spec.func, spec.keywords)
    with safe_yaml_representers():
        written = yaml.safe_load(yaml.safe_dump(spec))
    module, name = written.pop("_target_").rsplit(".", 1)
    assert written.pop("_partial_") and not written.pop("_args_")
    again = partial(getattr(importlib.import_module(module), name), **written)
    assert (again.func, again.keywords) == (spec.func, spec.keywords)


def test_a_provider_of_another_size_is_refused(space: ElasticSpace) -> None:
    with pytest.raises(
        UserError, match="the provider: hidden_size is 32, but the parent of the elastic space has 24"
    ):
        hybrid_stack_spec(space)(config(hidden_size=32))


def test_a_provider_of_another_stack_is_refused(space: ElasticSpace) -> None:
    with pytest.raises(UserError, match="restore_modelopt_state"):
        hybrid_stack_spec(space)(config({"restore_modelopt_state": True}))


def test_a_source_without_choices_is_refused(recipe: Path) -> None:
    recipe.write_text(json.dumps({"name": "tiny", "run_dir": "run", "model": {"sizes": SIZES}}))
    with pytest.raises(UserError, match="not elastic; give a recipe with space.choices"):
        hybrid_stack_spec(recipe)


def test_bridge_itself_builds_the_elastic_model() -> None:
    if importlib.util.find_spec("megatron.bridge") is None:
        pytest.skip("megatron-bridge is not installed (pip install --no-deps megatron-bridge omegaconf)")

    script = Path(__file__).with_name("bridge_on_cpu.py")
    # models built in this process left the attention backend that they chose in the environment
    clean = {k: v for k, v in os.environ.items() if not k.startswith("NVTE_")}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], capture_output=True, text=True, timeout=300,
        env=clean | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["stack"] == "ElasticHybridStack" and found["finite"] and found["yaml"]
    assert found["difference"] > 0.01, "the narrow submodel computed what the parent does"
