"""Training steps on ``paper_kernels``: of a stock model, and of submodels of the elastic one, for ``launches.py``.

A step is the forward and the backward pass of one micro-batch on one rank of ``EXPERT_RANKS`` that share the experts,
with its gradients added to fp32 sums. Teacher, optimizer and the reduction of gradients cost every step the same, and
are left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import paper_leaves
import torch
from counting import Counting, Counts, collectives
from torch import Tensor, nn

from elastic_megatron import runtime
from elastic_megatron.blocks import SlicedModel, build_elastic_model, build_model, build_sliced_model, running
from elastic_megatron.blocks.projection import projection
from elastic_megatron.blocks.stack import elastic_stack
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.ops.chunked_kd import chunked_distillation_loss
from elastic_megatron.ops.mix import SlicedMix
from elastic_megatron.router import BudgetRouter, RouterStep, budget_loss
from elastic_megatron.space import Budget, ElasticSpace, SubmodelSpec

EXPERT_RANKS = 8
Step = Callable[[], None]


@dataclass(frozen=True)
class Setting:
    """A space, its small submodel, and the tokens of a rank's micro-batch, one sequence."""

    space: ElasticSpace
    small: Mapping[str, int]
    tokens: int

    def of(self, pattern: str) -> Setting:
        """Of other layers."""
        space = self.space
        shape = space.parent.override(hybrid_layer_pattern=pattern)
        return Setting(
            ElasticSpace.build(shape, dict(space.choices), dict(space.lanes)), self.small, self.tokens
        )

    @property
    def spec(self) -> SubmodelSpec:
        return SubmodelSpec.of(self.small)

    def build(self, make: Callable[..., nn.Module], *args: Any) -> nn.Module:
        fused = {
            "moe_grouped_gemm": True, "moe_permute_fusion": True, "use_fused_weighted_squared_relu": True,
            "use_cpu_initialization": False, "perform_initialization": False,
        }  # fmt: skip
        with torch.device("meta"):
            model = make(*args, dtype=torch.bfloat16, spec=paper_leaves.spec(), **fused)
        return paper_leaves.settle(model)


def start() -> None:
    """One rank of eight, which are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    with torch.device("meta"):
        torch.empty(0)  # the context notes torch's functions once, and the runtime wraps them
    os.environ.update(WORLD_SIZE=str(EXPERT_RANKS), RANK="0", LOCAL_RANK="0")
    dist: Any = torch.distributed
    make = dist.new_group
    dist.init_process_group("fake", rank=0, world_size=EXPERT_RANKS, store=FakeStore())
    with mock.patch.object(dist, "new_group", lambda *a, **k: make(*a, **{**k, "backend": "fake"})):
        runtime.start(expert=EXPERT_RANKS)


def learn(model: Any, setting: Setting, extra: Tensor | None = None) -> None:
    """Forward and backward pass of one micro-batch, its loss by chunks as training has it."""
    ids = torch.empty(1, setting.tokens, dtype=torch.long, device="meta")
    student = projection(model, ids, ids, None)
    weights = torch.empty(1, setting.tokens, dtype=torch.float32, device="meta")
    loss, _ = chunked_distillation_loss(
        student, None, ids, weights, kind="forward_kl", temperature=1.0, ce_weight=1.0
    )
    (loss if extra is None else loss + extra).backward()


def stock(setting: Setting) -> Step:
    model = setting.build(build_model, setting.space.parent)
    return lambda: learn(model, setting)


def extracted(setting: Setting) -> Step:
    """The small submodel as a stock model."""
    model = setting.build(build_sliced_model, setting.space, setting.spec)
    return lambda: learn(model, setting)


def soft(setting: Setting) -> Step:
    """What a router samples, its loss, and all gradients of it."""
    model = setting.build(build_elastic_model, setting.space)
    budgets = [Budget(n, "active_params", t) for n, t in (("full", 1.0), ("middle", 0.8), ("small", 0.6))]
    router = BudgetRouter(setting.space, budgets, [b.target for b in budgets]).to("meta")

    def step() -> None:
        at = RouterStep(router)
        budget = router.budgets[-1]
        mix = at.mix(budget, key=(1, 2, 3), tau=1.0, logit_scale=1.0, hard=False)
        with running(model, mix):
            learn(model, setting, budget_loss(mix, budget)[0])
        at.backward(torch.distributed.group.WORLD)

    return step


def frozen(setting: Setting, small: bool) -> Step:
    """A submodel on its own widths, which no longer learn."""
    model = setting.build(build_elastic_model, setting.space)
    submodels = SlicedModel(model, stock=paper_leaves.spec())
    spec = setting.spec if small else setting.space.full()
    mix = SlicedMix(SubmodelMix.one_hot(setting.space, spec, "meta"), spec)
    with torch.device("meta"):
        paper_leaves.compile_activations(submodels.model_of(spec))

    def step() -> None:
        submodels.refresh()  # the optimizer has changed the weights
        part = submodels.model_of(spec)
        with elastic_stack(part).running(mix):
            learn(part, setting)

    return step


# a contender by its name, and the stock model that it is compared with
STEPS: Mapping[str, Callable[[Setting], Step]] = {
    "stock": stock,
    "elastic, soft": soft,
    "sliced, full": lambda setting: frozen(setting, small=False),
    "stock, small": extracted,
    "sliced, small": lambda setting: frozen(setting, small=True),
}
AGAINST = {"elastic, soft": "stock", "sliced, full": "stock", "sliced, small": "stock, small"}


def count(name: str, setting: Setting) -> Counts:
    """What a contender's second step asks for: the first one also fills tables that stay."""
    rows = setting.tokens * setting.space.parent.moe_router_topk
    with paper_leaves.installed(rows), collectives(run=False):
        step = STEPS[name](setting)
        step()
        with Counting() as counting:
            step()
    return counting.counts
