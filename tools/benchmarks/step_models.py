"""The models of the benchmark of steps, and one step of each of its contenders.

A step is the forward and the backward pass of one micro-batch, its gradients added to those that are there. The loss
is the sum of the cross-entropies, the same for all. Optimizer and teacher are left out: they cost every contender the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from interleave import Step, dtype_of, start
from torch import Tensor, nn

from elastic_megatron.blocks import SlicedModel, build_elastic_model, build_model, build_sliced_model, running
from elastic_megatron.checkpoint.slice import slice_state
from elastic_megatron.cost.account import flops_per_token
from elastic_megatron.cost.sizes import sizes_of_parent
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.ops.locate import weights
from elastic_megatron.router import BudgetRouter, RouterStep, budget_loss
from elastic_megatron.space import Budget, ElasticSpace, ParentShape, SubmodelSpec

SMALL = ParentShape(
    hybrid_layer_pattern="ME*EMEM-",
    hidden_size=512,
    vocab_size=8192,
    ffn_hidden_size=2048,
    moe_ffn_hidden_size=512,
    moe_shared_expert_intermediate_size=1024,
    num_moe_experts=16,
    moe_router_topk=2,
    moe_router_topk_scaling_factor=2.5,
    mamba_num_heads=16,
    mamba_head_dim=64,
    mamba_state_dim=64,
    mamba_num_groups=4,
    num_attention_heads=16,
    num_query_groups=4,
    kv_channels=32,
)
# a billion parameters and more, for an accelerator
LARGE = SMALL.override(
    hybrid_layer_pattern="MEMEM*EMEMEM-",
    hidden_size=2048,
    vocab_size=65536,
    ffn_hidden_size=8192,
    moe_ffn_hidden_size=1024,
    moe_shared_expert_intermediate_size=2048,
    mamba_num_heads=64,
    mamba_num_groups=8,
    mamba_state_dim=128,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=64,
)
# of the parent's width, per budget: in eighths
BUDGETS: Mapping[str, Mapping[str, int]] = {
    "full": {},
    "middle": {"hidden_size": 7, "mamba_num_heads": 6, "moe_ffn_hidden_size": 6,
               "moe_shared_expert_intermediate_size": 6, "ffn_hidden_size": 6, "num_moe_experts": 7},
    "small": {"hidden_size": 6, "mamba_num_heads": 4, "moe_ffn_hidden_size": 3,
              "moe_shared_expert_intermediate_size": 3, "ffn_hidden_size": 3, "num_moe_experts": 6,
              "num_attention_heads": 6},
}  # fmt: skip
_TARGETS = {"full": 1.0, "middle": 0.7, "small": 0.45}


def space_of(parent: ParentShape) -> ElasticSpace:
    """Every width axis of the budgets that the parent has, with the widths that they name."""
    axes = {a for widths in BUDGETS.values() for a in widths if parent.size(a)}
    return ElasticSpace.build(
        parent,
        {a: sorted({parent.size(a) * w[a] // 8 for w in BUDGETS.values() if a in w}) for a in axes},
    )


def spec_of(space: ElasticSpace, budget: str) -> SubmodelSpec:
    """The submodel of a budget."""
    widths = BUDGETS[budget]
    spec = SubmodelSpec.of({a: space.parent.size(a) * widths.get(a, 8) // 8 for a in space.axes})
    space.check(spec, budget)
    return spec


def flops(space: ElasticSpace, budget: str, length: int) -> float:
    """Forward FLOPs per token of a budget's submodel, by those of the parent."""
    whole = flops_per_token(sizes_of_parent(space.parent), length)
    return float(flops_per_token(sizes_of_parent(space.shape_of(spec_of(space, budget))), length) / whole)


@dataclass(frozen=True)
class Setting:
    """What a step runs on: a parent, and micro-batches of ``batch`` sequences of ``length`` tokens."""

    parent: ParentShape
    batch: int
    length: int
    device: torch.device

    @property
    def space(self) -> ElasticSpace:
        return space_of(self.parent)

    @property
    def tokens(self) -> int:
        return self.batch * self.length


class Steps:
    """Builds the contenders of one setting, all with the same weights; a model that two of them run is built once."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.space = setting.space
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(
            setting.parent.vocab_size, (setting.batch, setting.length + 1), generator=generator
        ).to(setting.device)
        positions = torch.arange(setting.length, device=setting.device).expand(setting.batch, -1)
        self.inputs, self.labels = (ids[:, :-1].contiguous(), positions), ids[:, 1:].flatten()

    @cached_property
    def elastic(self) -> nn.Module:
        return self._build(build_elastic_model, self.space)

    def _build(self, build: Callable[..., nn.Module], *args: Any) -> nn.Module:
        """From the same seed: equal tensors are drawn alike."""
        start()
        model = build(*args, dtype=dtype_of(self.setting.device))
        return model.to(self.setting.device).train()

    def plain(self) -> Step:
        """The stock ``HybridModel``, without the plug-in."""
        model = self._build(build_model, self.setting.parent)
        return lambda: self.backward(model)

    def extracted(self, budget: str) -> Step:
        """A budget's submodel, cut out, as a stock ``HybridModel``."""
        spec = spec_of(self.space, budget)
        whole = weights(self._build(build_model, self.setting.parent).state_dict())
        model = self._build(build_sliced_model, self.space, spec)
        model.load_state_dict(dict(slice_state(self.space, spec, whole.items())), strict=False)
        return lambda: self.backward(model)

    def masked(self, budget: str) -> Step:
        """A budget's submodel as a mask of the parent: one-hot choices, no gradient of them."""
        mix = SubmodelMix.one_hot(self.space, spec_of(self.space, budget), self.setting.device)
        return lambda: self.backward(self.elastic, mix)

    @cached_property
    def submodels(self) -> SlicedModel:
        return SlicedModel(self.elastic)

    def sliced(self, budget: str, *, learning: bool = False) -> Step:
        """A budget's submodel on its own widths; its weights are cut out anew, as after a step of the optimizer.

        Args:
            learning: with gradients of the one-hot choices, for a router that still learns.
        """
        mix = SubmodelMix.one_hot(self.space, spec_of(self.space, budget), self.setting.device)
        for probabilities in mix.tensors():
            probabilities.requires_grad_(learning)

        def step() -> None:
            self.submodels.refresh()
            self.learn(self.submodels.forward(mix, *self.inputs, None))

        return step

    def soft(self) -> Step:
        """What a fresh router samples for the smallest budget, its loss, and all gradients of it."""
        router = BudgetRouter(
            self.space, [Budget(n, "active_params", t) for n, t in _TARGETS.items()], list(_TARGETS.values())
        ).to(self.setting.device)
        budget = router.budgets[-1]

        def step() -> None:
            at = RouterStep(router)
            mix = at.mix(budget, key=(1, 2, 3), tau=1.0, logit_scale=1.0, hard=False)
            loss, _ = budget_loss(mix, budget, dead_zone=0.0, identity_weight=0.0)
            self.backward(self.elastic, mix, loss)
            at.backward()

        return step

    def decided(self, *, flush: bool) -> Step:
        """Choices that a trained router has all but decided: the others' weights, 1e-40, are denormal numbers.

        Args:
            flush: whether the processor takes denormal numbers for zero, as ``runtime.start`` makes it.
        """
        logits = {a: torch.full((len(self.space.choices_of(a)),), -92.1) for a in self.space.axes}
        for values in logits.values():
            values[-1] = 0.0
        leaves = {a: values.to(self.setting.device).requires_grad_() for a, values in logits.items()}

        def step() -> None:
            torch.set_flush_denormal(flush)
            mix = SubmodelMix(self.space, {a: v.softmax(-1) for a, v in leaves.items()})
            self.backward(self.elastic, mix)
            torch.set_flush_denormal(True)

        return step

    def backward(self, model: nn.Module, mix: SubmodelMix | None = None, extra: Tensor | None = None) -> None:
        """One step of a model: of a mix, where one is given, with a term of the loss beside it."""
        with running(model, mix) if mix is not None else nullcontext():
            logits = model(*self.inputs, None)
        self.learn(logits, extra)

    def learn(self, logits: Tensor, extra: Tensor | None = None) -> None:
        """The backward pass of the sum of cross-entropies and of a term beside it."""
        loss = F.cross_entropy(logits.flatten(0, 1).float(), self.labels, reduction="sum")
        (loss if extra is None else loss + extra).backward()


# contenders by name; a fresh process that measures memory builds one of them alone
CONTENDERS: Mapping[str, Callable[[Steps], Step]] = {
    "stock": Steps.plain,
    "masked, soft": Steps.soft,
    "masked, decided": lambda steps: steps.decided(flush=True),
    "masked, decided, denormal": lambda steps: steps.decided(flush=False),
    **{f"masked, {b}": lambda steps, b=b: steps.masked(b) for b in BUDGETS},
    **{f"sliced, {b}": lambda steps, b=b: steps.sliced(b) for b in BUDGETS},
    "sliced learning, small": lambda steps: steps.sliced("small", learning=True),
    **{f"extracted, {b}": lambda steps, b=b: steps.extracted(b) for b in BUDGETS},
}
