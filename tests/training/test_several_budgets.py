"""Several budgets on one micro-batch: one pass of the teacher, and the gradients of the budgets, weighted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from laws import build_elastic, gradients, one_hot, randomise, subspace, tokens, worst
from torch import Tensor

from elastic_megatron.blocks import build_model
from elastic_megatron.recipe import load
from elastic_megatron.space import SubmodelSpec
from elastic_megatron.training.distill import DistilledChunk
from elastic_megatron.training.step import ForwardStep, MicroBatch

SPACE = subspace()
SPECS: dict[str, SubmodelSpec] = {"full": SPACE.full(), "small": SPACE.smallest()}

pytestmark = pytest.mark.usefixtures("fp64", "megatron", "fresh_moe_globals")


class Watched(torch.nn.Module):
    """Counts calls of a teacher."""

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.calls = 0
        teacher.register_forward_pre_hook(self.count)

    def count(self, *_: Any) -> None:
        self.calls += 1


@pytest.fixture(scope="module")
def pair(megatron: Any) -> tuple[DistilledChunk, Watched]:
    settings = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1}
    student = build_elastic(SPACE, **settings).train()
    teacher = randomise(build_model(SPACE.parent, dtype=torch.float64), seed=5).eval().requires_grad_(False)
    return DistilledChunk(student, teacher), Watched(teacher)


@pytest.fixture
def step(tmp_path: Any) -> ForwardStep:
    file = tmp_path / "r.yaml"
    file.write_text(
        "name: x\nrun_dir: run\nmodel: {checkpoint: parent}\nloss: {kind: forward_kl, ce_weight: 0.3}\n"
    )
    mixes = {name: one_hot(SPACE, spec) for name, spec in SPECS.items()}
    return ForwardStep(load(file), None, 10, mixes)


def batch_of(budget: str, seed: int = 0, **more: Any) -> MicroBatch:
    ids, positions = tokens(SPACE, 2, 11, seed)
    mask = torch.ones(2, 11, dtype=torch.float64)
    mask[0, :4] = 0
    return MicroBatch(ids, ids.roll(-1, 1), mask, positions, 0, budget, (1,), **more)


def run(
    step: ForwardStep, pair: DistilledChunk, batches: Iterable[MicroBatch]
) -> tuple[dict[str, Tensor], list[Any]]:
    pair.zero_grad()
    step.begin()
    found = []
    for batch in batches:
        output, loss = step(iter([batch]), pair)
        total, count, sums = loss(output)
        total.backward()
        found.append((float(total.detach()), int(count), float(sums["kd_loss"])))
    step.finish()
    return gradients(pair.module), found


def test_the_gradient_is_the_weighted_sum_for_one_pass_of_the_teacher(
    pair: tuple[DistilledChunk, Watched], step: ForwardStep
) -> None:
    chunk, watched = pair
    alone = {name: run(step, chunk, [batch_of(name)]) for name in SPECS}
    before = watched.calls
    weights = {"full": 0.7, "small": 0.45}
    found, logged = run(step, chunk, [
        batch_of(name, weight=weight, again=name != "full") for name, weight in weights.items()
    ])  # fmt: skip
    assert watched.calls == before + 1
    expected = {n: sum(weights[name] * alone[name][0][n] for name in SPECS) for n in alone["full"][0]}
    assert worst(found, expected)[0] <= 1e-12  # type: ignore[arg-type]
    for (total, count, kd), (name, weight) in zip(logged, weights.items(), strict=True):
        assert total == pytest.approx(weight * alone[name][1][0][0], rel=1e-12)
        assert kd == pytest.approx(weight * alone[name][1][0][2], rel=1e-12)
        assert count == (18 if name == "full" else 0), "tokens count once"


def test_the_next_micro_batch_asks_the_teacher_anew(
    pair: tuple[DistilledChunk, Watched], step: ForwardStep
) -> None:
    chunk, watched = pair
    _, (other,) = run(step, chunk, [batch_of("small", seed=3)])
    before = watched.calls
    _, found = run(step, chunk, [
        batch_of("full"), replace(batch_of("small"), again=True), batch_of("small", seed=3),
    ])  # fmt: skip
    assert watched.calls == before + 2
    assert found[2] == pytest.approx(other, rel=1e-12)
