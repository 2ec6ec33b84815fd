"""Ranks that exchange tokens must run the same widths: `samples_per_draw` is refused exactly where they would not."""

from collections.abc import Iterator
from itertools import product
from math import lcm

import pytest
from megatron.core.parallel_state import RankGenerator

from elastic_megatron.recipe import checks
from elastic_megatron.recipe.elastic import ParameterBudget
from elastic_megatron.recipe.training import Parallel, Stage

SIZES = (1, 2, 3)
LAYOUTS = [
    Parallel(tensor=tensor, context=context, expert=expert, expert_tensor=expert_tensor, pipeline=pipeline)
    for tensor, context, expert, expert_tensor, pipeline in product(SIZES, SIZES, SIZES, (None, 1, 2), (1, 2))
]


def draws_differ(parallel: Parallel, stage: Stage, world: int) -> bool:
    """Does any group of Megatron's see two draws in one micro-batch? Group by group, rank by rank."""
    data = world // (parallel.tensor * parallel.context * parallel.pipeline)
    drawn = {}
    dense = RankGenerator(parallel.tensor, 1, data, parallel.pipeline, parallel.context, "tp-cp-ep-dp-pp")
    for ranks in dense.get_ranks("dp"):
        for data_rank, rank in enumerate(ranks):
            drawn[rank] = [
                (m * data + data_rank) * stage.micro_batch_size // stage.draw_size
                for m in range(stage.global_batch_size // (stage.micro_batch_size * data))
            ]
    return any(drawn[rank] != drawn[ranks[0]] for ranks in groups(parallel, world) for rank in ranks)


def groups(parallel: Parallel, world: int) -> Iterator[list[int]]:
    expert_tensor = parallel.expert_tensor or parallel.tensor
    rest = world // (expert_tensor * parallel.expert * parallel.pipeline)
    yield from RankGenerator(expert_tensor, parallel.expert, rest, parallel.pipeline, 1,
                             "tp-cp-ep-dp-pp").get_ranks("tp-ep")  # fmt: skip


@pytest.mark.parametrize(("replicas", "micro_batch_size", "micro_batches"), [(1, 2, 3), (2, 1, 2), (2, 3, 1)])
def test_recipes_are_refused_exactly_where_ranks_of_an_expert_group_would_draw_differently(
    replicas: int, micro_batch_size: int, micro_batches: int
) -> None:
    """Every layout, and every number of sequences per draw that divides the batch."""
    verdicts = set()
    for parallel in LAYOUTS:
        replica = parallel.tensor * parallel.context
        stage_ranks = lcm(replica, (parallel.expert_tensor or parallel.tensor) * parallel.expert) * replicas
        units = micro_batches * stage_ranks // replica
        for count in (n for n in range(1, units + 1) if units % n == 0):
            stage = Stage(
                name="s", tokens=1, seq_length=1, global_batch_size=units * micro_batch_size,
                micro_batch_size=micro_batch_size, samples_per_draw=count * micro_batch_size,
            )  # fmt: skip
            found = problems(parallel, stage)
            world = stage_ranks * parallel.pipeline
            assert bool(found) == draws_differ(parallel, stage, world), (parallel, stage)
            verdicts.add(bool(found))
            if found:
                remedy = int(found[0].rpartition("write ")[2])
                mended = stage.model_copy(update={"samples_per_draw": remedy})
                assert not problems(parallel, mended) and not draws_differ(parallel, mended, world)
    assert verdicts == {True, False}


def problems(parallel: Parallel, stage: Stage) -> list[str]:
    budgets = {"small": ParameterBudget(metric="active_params", target=0.5)}
    found = checks.run({"parallel": parallel, "stages": (stage,), "budgets": budgets})
    return [p.text for p in found if p.at == ("stages", 0, "samples_per_draw")]


def test_without_budgets_nothing_is_drawn() -> None:
    stage = Stage(name="s", tokens=1, seq_length=1, global_batch_size=2)
    assert checks.run({"parallel": Parallel(expert=2), "stages": (stage,), "budgets": {}}) == []


def test_a_draw_is_a_micro_batch_unless_the_recipe_says_more() -> None:
    stage = Stage(name="s", tokens=1, seq_length=1, global_batch_size=12, micro_batch_size=3)
    assert stage.draw_size == 3
    assert stage.model_copy(update={"samples_per_draw": 6}).draw_size == 6
