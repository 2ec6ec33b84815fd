"""Remedies are tried: each that is named mends its problem and breaks nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_shapes import DENSE, NANO

from elastic_megatron.cost.layout import check_setting
from elastic_megatron.cost.remedy import described, problems_of, remedies, said
from elastic_megatron.cost.setting import Setting
from elastic_megatron.recipe.elastic import Rank
from elastic_megatron.recipe.training import Parallel, Stage
from elastic_megatron.space import ElasticSpace, ParentShape

SPACES = {
    None: None,
    "experts": ElasticSpace.build(NANO, {"num_moe_experts": [96, 128]}, {"num_moe_experts": 8}),
    "heads": ElasticSpace.build(NANO, {"mamba_num_heads": [48, 64], "num_attention_heads": [16, 32]}),
}


@st.composite
def layouts(draw: st.DrawFn, moe: bool) -> dict[str, Any]:
    sizes = [1, 2, 3, 4, 8]
    layout: dict[str, Any] = {
        name: draw(st.sampled_from(sizes)) for name in ("tensor", "context", "pipeline")
    }
    layout["sequence"] = draw(st.booleans()) and layout["tensor"] > 1
    if moe:
        layout["expert"] = draw(st.sampled_from([1, 2, 3, 8]))
        layout["expert_tensor"] = draw(st.sampled_from([None, 1, 2]))
    if layout["pipeline"] > 1:
        layout["virtual_pipeline"] = draw(st.sampled_from([None, 2, 30]))
    return layout


@st.composite
def settings_of_jobs(draw: st.DrawFn) -> Setting:
    shape = draw(st.sampled_from([NANO, DENSE]))
    space = SPACES[draw(st.sampled_from(list(SPACES)))] if shape is NANO else None
    nodes, node = draw(st.integers(1, 12)), draw(st.sampled_from([3, 4, 8]))
    parallel = Parallel(**draw(layouts(shape is NANO)), world_size=nodes * node)
    stages = [
        Stage(
            name="s", tokens=1, seq_length=draw(st.sampled_from([64, 100, 4096])),
            global_batch_size=4 * draw(st.integers(1, 40)), micro_batch_size=draw(st.sampled_from([1, 2, 4])),
        )
    ]  # fmt: skip
    return Setting.of(
        shape, space, parallel, stages, ranks_per_node=node, most_per_node=8, most_nodes=64, draws=True
    )


def kinds(setting: Setting) -> list[str]:
    return sorted(re.sub(r"\d+", "#", problem.text) for problem in problems_of(setting))


@settings(max_examples=60)
@given(settings_of_jobs())
def test_a_remedy_mends_its_problem_and_breaks_nothing(setting: Setting) -> None:
    before = kinds(setting)
    for problem in problems_of(setting):
        for change in remedies(setting, problem):
            changed = setting.changed(change)
            assert changed is not None
            left = kinds(changed)
            rest = list(before)
            rest.remove(re.sub(r"\d+", "#", problem.text))
            assert all(left.count(kind) <= rest.count(kind) for kind in left), (problem.text, change)


@given(settings_of_jobs())
def test_ranks_and_batches_are_refused_exactly_where_they_do_not_divide(setting: Setting) -> None:
    p, stage = setting.parallel, setting.stages[0]
    world, experts = p.world_size or 0, p.expert_tensor or p.tensor
    texts = " ".join(problem.text for problem in problems_of(setting))
    dense = world % (p.tensor * p.context * p.pipeline)
    assert (f"tensor {p.tensor} x pipeline" in texts) == (dense != 0)
    assert ("expert_tensor" in texts and "x expert" in texts) == (
        world % (experts * p.expert * p.pipeline) != 0
    )
    replicas = 0 if dense else world // (p.tensor * p.context * p.pipeline)
    uneven = bool(replicas) and stage.global_batch_size % (stage.micro_batch_size * replicas) != 0
    assert ("data-parallel ranks" in texts.replace("data-parallel ranks of", "")) == uneven
    together = math.lcm(p.tensor * p.context, experts * p.expert) // (p.tensor * p.context)
    assert ("share a draw" in texts) == (together > 1)


def test_every_single_wrong_number_has_a_remedy() -> None:
    """From a layout that fits, one number at a time; where nothing helps, a line says so, and none does here."""
    base: dict[str, Any] = {"tensor": 2, "sequence": True, "expert": 4, "expert_tensor": 1, "context": 2}
    space = SPACES["experts"]
    stage = Stage(name="s", tokens=1, seq_length=4096, global_batch_size=64, micro_batch_size=2)
    fits = Setting.of(NANO, space, Parallel(**base, world_size=32), [stage], ranks_per_node=8, most_nodes=64)
    assert problems_of(fits) == []
    tried = 0
    for name in ("tensor", "expert", "context", "pipeline"):
        for value in (3, 5, 6, 7, 16, 32, 64):
            wrong = fits.changed({f"parallel.{name}": value})
            assert wrong is not None
            for problem in problems_of(wrong):
                tried += 1
                assert remedies(wrong, problem), (name, value, problem.text)
    assert tried > 20


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"parallel.tensor": 1, "parallel.sequence": False},
            "set parallel.tensor=1 and parallel.sequence=false",
        ),
        ({"parallel.virtual_pipeline": None}, "set parallel.virtual_pipeline=null"),
        ({"space.choices.x": [1, 2]}, "set space.choices.x=[1,2]"),
        ({"parallel.recompute": "full"}, "set parallel.recompute=full"),
        ({"space.lanes.x": 8}, "set space.lanes.x=8 and rank again"),
    ],
)
def test_remedies_are_written_as_overrides(change: dict[str, Any], text: str) -> None:
    assert said(change) == text


def test_what_no_number_mends_is_said_all_the_same() -> None:
    shape = replace(NANO, vocab_size=131073)
    setting = Setting.of(shape, None, Parallel(tensor=2, sequence=True, expert_tensor=1))
    (line,) = check_setting(setting)
    assert line.endswith(", or pad the vocabulary to 131074")
    nodes = Setting.of(NANO, None, Parallel(pipeline=5, world_size=3), ranks_per_node=3, most_nodes=1)
    only = next(p for p in problems_of(nodes) if "pipeline 5" in p.text)
    assert described(nodes, only).endswith("; set parallel.pipeline=3")


def test_calibration_samples_divide_among_the_replicas() -> None:
    for samples in range(1, 40):
        for micro, world in ((1, 1), (3, 1), (1, 4), (2, 4), (3, 4)):
            setting = Setting.of(
                DENSE,
                None,
                Parallel(world_size=world),
                calibration=Rank(samples=samples, micro_batch_size=micro),
            )
            assert bool(problems_of(setting)) == (world > 1 and samples % (micro * world) > 0)
            for problem in problems_of(setting):
                for change in remedies(setting, problem):
                    changed = setting.changed(change)
                    assert changed is not None and problems_of(changed) == []


def test_a_setting_reads_a_recipes_sections() -> None:
    parallel = Parallel(tensor=2, recompute="full", distributed_optimizer=False, world_size=4)
    sizes = Setting.of(DENSE, None, parallel).parallel
    assert sizes.recompute is True and sizes.distributed_optimizer is False and sizes.world_size == 4
    assert json.dumps(sizes.tensor) == "2" and isinstance(DENSE, ParentShape)
