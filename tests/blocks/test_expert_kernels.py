"""How expert layers run changes no number. Fused activations belong to Transformer Engine's experts: tests/te."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import (
    build_elastic,
    gradients,
    one_hot,
    relative,
    run,
    scalar,
    soft_mix,
    spec_of,
    subspace,
    tokens,
    worst,
)
from torch import Tensor

from elastic_megatron.blocks import SlicedModel
from elastic_megatron.ops import SubmodelMix

SPACE = subspace("E*E")
NARROW = spec_of(SPACE, hidden_size=16, moe_shared_expert_intermediate_size=4, num_moe_experts=4)


def passed(mode: str, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of weights and choices, in fp64."""
    model = build_elastic(SPACE, **settings).train()
    mix: SubmodelMix | None = None
    if mode != "parent":
        mix = soft_mix(SPACE, 3) if mode == "soft" else one_hot(SPACE, NARROW)
    inputs = tokens(SPACE, 2, 11)
    out = (
        SlicedModel(model).forward(mix, *inputs, None)
        if mode == "sliced" and mix
        else run(model, mix, inputs)
    )
    scalar(out).backward()
    choices = {f"mix.{a}": p.grad for a, p in mix.probs.items() if p.grad is not None} if mix else {}
    return out.detach(), gradients(model) | choices


@pytest.mark.parametrize("mode", ["parent", "soft", "hard", "sliced"])
def test_shared_experts_beside_the_dispatcher_change_no_number(megatron: Any, fp64: None, mode: str) -> None:
    found, expected = passed(mode, moe_shared_expert_overlap=True), passed(mode)
    assert relative(found[0], expected[0]) < 1e-13
    assert worst(found[1], expected[1])[0] < 1e-12


def test_megatron_recognizes_the_activation(megatron: Any) -> None:
    """Its fused kernels compare the function itself."""
    from megatron.core.activations import squared_relu

    model = build_elastic(SPACE, torch.float32)
    assert model.config.activation_func is squared_relu
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(squared_relu(x), torch.relu(x).square())
