"""Jobs whose widths are known keep copies of what their submodels cannot read in place; no others do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from chain_files import SHAPE, write_quantised_chain
from test_chain_families import store

from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.cost.rank_memory import Load
from elastic_megatron.cost.sliced_memory import Submodels
from elastic_megatron.preflight.family import Families
from elastic_megatron.preflight.memory import loads
from elastic_megatron.recipe import load_jobs
from elastic_megatron.space import ElasticSpace, SubmodelSpec

SPACE = ElasticSpace.build(SHAPE, {"hidden_size": [128, 256]})
SPECS = {"large": SPACE.full(), "small": SubmodelSpec.of({"hidden_size": 128})}
FROZEN = ("quantize=null", "router.frozen=true")


def stage_load(folder: Path, *overrides: str) -> Load:
    """Of the one stage of a job that goes on from a trained family."""
    folder.mkdir(exist_ok=True)
    chain = write_quantised_chain(folder)
    store(folder / "runs/train", Manifest(SHAPE, SPACE, (), SPECS))
    jobs = load_jobs(chain.with_name("qad.yaml"), [f"slurm.cluster={folder}/cluster.yaml", *overrides])
    return dict(loads(jobs, jobs.jobs[0], Families(jobs).of(jobs.jobs[0])))["stages.0"]


def test_frozen_widths_are_sliced_and_their_masks_learn_nothing(tmp_path: Path) -> None:
    load = stage_load(tmp_path / "frozen", *FROZEN)
    assert load.sliced == Submodels(SPACE, frozenset(SPECS.values())) and not load.elastic
    learns = stage_load(tmp_path / "learns", "quantize=null", "router.frozen=false")
    assert learns.sliced is None and learns.elastic


def test_budgets_that_are_not_drawn_copy_nothing(tmp_path: Path) -> None:
    load = stage_load(tmp_path, *FROZEN, "stages.0.budget_probs={large: 1}")
    assert load.sliced == Submodels(SPACE, frozenset([SPECS["large"]]))


def test_quantised_submodels_are_copied_unless_they_are_of_linears_that_take_strides(tmp_path: Path) -> None:
    """Those of Megatron's own, where experts of one layer are not stored alike."""
    submodels = Submodels(SPACE, frozenset(SPECS.values()))
    assert stage_load(tmp_path / "fused").sliced == submodels
    apart = stage_load(tmp_path / "apart", 'quantize.keep=["*.experts.3.*"]')
    assert apart.sliced == replace(submodels, dense=False)


@pytest.mark.parametrize("overrides", [FROZEN, ()], ids=["plain", "quantised"])
def test_what_is_masked_copies_nothing(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    assert stage_load(tmp_path, *overrides, "stages.0.execution=masked").sliced is None
