"""The moe_router of a masked model is that of the sliced one: tokens, auxiliary losses, bias statistics."""

from __future__ import annotations

from fractions import Fraction
from math import lcm
from typing import Any

import pytest
import torch
from laws import (
    build_elastic,
    build_slice,
    gradients,
    one_hot,
    recomputing,
    run,
    scalar,
    spec_of,
    subspace,
    tokens,
    worst,
)
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias
from torch import Tensor

from elastic_megatron.blocks.mixers import _excess
from elastic_megatron.checkpoint.slice import slice_state
from elastic_megatron.space import ElasticSpace, SubmodelSpec

SPACE = subspace("EME", per_layer=True)
EXPERTS = SPACE.parent.num_moe_experts
HETEROGENEOUS = {"num_moe_experts": [4, 6], "moe_ffn_hidden_size": [3, 11]}
SPECS = {
    "full": SPACE.full(),
    "fewer experts": spec_of(SPACE, num_moe_experts=4),
    "smallest": SPACE.smallest(),
    "heterogeneous": spec_of(SPACE, **HETEROGENEOUS),
}


pytestmark = pytest.mark.usefixtures("fresh_moe_globals")


def routers(model: Any) -> list[Any]:
    return [layer.mlp.router for layer in model.decoder.layers if hasattr(layer, "mlp")]


def present(space: ElasticSpace, spec: SubmodelSpec, position: int) -> Tensor:
    """[experts] booleans."""
    kept = torch.zeros(space.parent.num_moe_experts, dtype=torch.bool)
    kept[space.kept("num_moe_experts", spec.at("num_moe_experts", position))] = True
    return kept


def routing_maps(model: Any) -> list[list[Tensor]]:
    """Filled with the [tokens, experts] map of every forward pass, a list a router."""
    found: list[list[Tensor]] = []
    for router in routers(model):
        calls: list[Tensor] = []
        router.register_forward_hook(lambda _, __, out, calls=calls: calls.append(out[1].detach().clone()))
        found.append(calls)
    return found


@pytest.mark.usefixtures("fp64", "megatron")
@pytest.mark.parametrize("function", ["sigmoid", "softmax"])
def test_cut_experts_never_receive_tokens(function: str) -> None:
    """Also where a kept expert's score + bias is negative and a cut expert's own bias would win with score 0."""
    bias = function == "sigmoid"
    model = build_elastic(SPACE, moe_router_score_function=function, moe_router_enable_expert_bias=bias)
    maps = routing_maps(model)
    for name in ("fewer experts", "smallest", "heterogeneous"):
        for position, router in enumerate(routers(model) if bias else ()):
            router.expert_bias.uniform_(-4, -3)
            router.expert_bias[~present(SPACE, SPECS[name], position)] = 0.5
        run(model, one_hot(SPACE, SPECS[name]), tokens(SPACE, 3, 17))
        for position, calls in enumerate(maps):
            kept = present(SPACE, SPECS[name], position)
            assert not calls[-1][:, ~kept].any()
            assert (calls[-1].sum(1) == SPACE.parent.moe_router_topk).all()


LOSSES: dict[str, dict[str, Any]] = {
    "aux": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.37},
    "seq-aux": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.37},
    "z": {"moe_z_loss_coeff": 0.11},
    "aux-and-z": {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.37,
        "moe_z_loss_coeff": 0.11,
    },
    "aux-softmax": {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.37,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
    },
    "both-aux": {
        "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
        "moe_aux_loss_coeff": [0.37, 0.21],
    },
}


COEFFICIENTS = ("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff")


def recorded() -> dict[str, Tensor]:
    """[layers] values of every auxiliary loss since the last call."""
    found = {
        name: entry.values.detach().double() for name, entry in get_moe_metrics_tracker().metrics.items()
    }
    set_moe_metrics_tracker(MoEMetricsTracker())
    return found


@pytest.mark.usefixtures("fp64", "megatron")
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("loss", LOSSES)
def test_auxiliary_losses_equal_those_of_the_sliced_model(loss: str, name: str, recompute: bool) -> None:
    spec, inputs = SPECS[name], tokens(SPACE, 3, 11)
    model = build_elastic(SPACE, **LOSSES[loss]).train()
    sliced = build_slice(model, SPACE, spec, **LOSSES[loss]).train()
    with recomputing(model, "uniform" if recompute else None):
        scalar(run(model, one_hot(SPACE, spec), inputs)).backward()
    masked_values = recorded()
    scalar(sliced(*inputs, None)).backward()
    cut_values = recorded()
    assert set(masked_values) == set(cut_values) and all(v.any() for v in cut_values.values())
    assert worst(masked_values, cut_values)[0] <= 1e-6  # the tracker keeps fp32
    cut = gradients(sliced)
    assert worst(dict(slice_state(SPACE, spec, gradients(model).items())), cut)[0] <= 1e-12
    routing = {k: v for k, v in LOSSES[loss].items() if k not in COEFFICIENTS}
    without = build_slice(model, SPACE, spec, **routing).train()
    scalar(without(*inputs, None)).backward()
    assert worst(gradients(without), cut)[0] > 1e-6, "the auxiliary loss changes nothing"


@pytest.mark.usefixtures("fp64", "megatron")
@pytest.mark.parametrize("loss", ["aux", "seq-aux"])
def test_a_dropped_layer_has_no_auxiliary_loss(loss: str) -> None:
    space = ElasticSpace.build(SPACE.parent, {"num_layers": [2]}, layer_order=[0, 1, 2])
    spec, inputs = space.smallest(), tokens(space, 3, 11)
    model = build_elastic(space, **LOSSES[loss]).train()
    sliced = build_slice(model, space, spec, **LOSSES[loss]).train()
    scalar(run(model, one_hot(space, spec), inputs)).backward()
    scalar(sliced(*inputs, None)).backward()
    masked = gradients(model)
    assert worst(dict(slice_state(space, spec, masked.items())), gradients(sliced))[0] <= 1e-12
    assert not any(g.any() for n, g in masked.items() if n.startswith("decoder.layers.2."))


def short_of_fair_share(maps: list[Tensor], kept: list[Tensor]) -> list[Fraction]:
    """Slow truth: by how many tokens each expert fell short of its fair share, summed over micro-batches."""
    short = [Fraction(0)] * EXPERTS
    for tokens_of, k in zip(maps, kept, strict=True):
        count = tokens_of.sum(0)
        for e in range(EXPERTS):
            if k[e]:
                short[e] += Fraction(int(count.sum()), int(k.sum())) - int(count[e])
            else:
                assert count[e] == 0
    return short


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize(
    "drawn",
    [
        ["full", "full"],
        ["smallest"],
        ["smallest", "fewer experts", "smallest"],
        ["heterogeneous", "full", "smallest"],
        ["heterogeneous"] * 3,
        ["full", "smallest"],
    ],
    ids=lambda d: "+".join(d),
)
@pytest.mark.parametrize("seed", [0, 1])
def test_bias_updates_follow_the_fair_share_among_present_experts(
    megatron: Any, drawn: list[str], recompute: bool, seed: int
) -> None:
    model = build_elastic(SPACE, torch.float32, seed=seed).train()
    with torch.no_grad():
        for router in routers(model):
            router.expert_bias.zero_()
    maps = routing_maps(model)
    with recomputing(model, "uniform" if recompute else None):
        for m, name in enumerate(drawn):
            inputs = tokens(SPACE, 2, 13 + 4 * m, seed + m)
            run(model, one_hot(SPACE, SPECS[name], torch.float32), inputs).sum().backward()
    for position, router in enumerate(routers(model)):
        # recomputation routes twice and must count once
        calls = maps[position][:: 2 if recompute else 1]
        kept = [present(SPACE, SPECS[name], position) for name in drawn]
        update = get_updated_expert_bias(router.local_tokens_per_expert, torch.zeros(EXPERTS), 1.0, None)
        for e, short in enumerate(short_of_fair_share(calls, kept)):
            assert float(update[e]) == (short > 0) - (short < 0)


@pytest.mark.parametrize(
    ("size", "choices"), [(8, (6, 5)), (16, (12, 9)), (128, (112, 104)), (512, (448, 320))]
)
def test_the_bias_of_an_absent_expert_never_moves(megatron: Any, size: int, choices: tuple[int, ...]) -> None:
    """Whatever the rounding: token counts that no number of experts divides, over many micro-batches."""
    unit = lcm(size, *choices)
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        total = torch.zeros(size, dtype=torch.float64)
        for number in choices * 3:
            present = torch.arange(size) < number
            count = torch.where(present, torch.randint(0, 500_000, (size,), generator=g), 0).double()
            total += _excess(count, present, unit)
        update = get_updated_expert_bias(total.clone(), torch.zeros(size), 1.0, None)
        assert not update[max(choices) :].any() and update[: min(choices)].abs().mean() > 0.9


@pytest.mark.usefixtures("megatron")
def test_bias_statistics_do_not_depend_on_how_tokens_are_divided_among_ranks() -> None:
    """Counts of parts add up to the count of the whole exactly, so also a tie stays one."""
    g = torch.Generator().manual_seed(0)
    present = torch.arange(8) < 6
    parts = torch.where(present, torch.randint(0, 1000, (7, 8), generator=g), 0).double()
    parts[:, 1] = parts[:, present].sum(1) / 6  # an expert with exactly its share
    parts = parts.floor()
    whole = _excess(parts.sum(0), present, lcm(8, 6, 4))
    assert torch.equal(sum(_excess(part, present, lcm(8, 6, 4)) for part in parts), whole)


def test_bias_updates_of_full_budgets_are_stock(megatron: Any) -> None:
    model = build_elastic(SPACE, torch.float32).train()
    maps = routing_maps(model)
    run(model, one_hot(SPACE, SPACE.full(), torch.float32), tokens(SPACE, 3, 13))
    for router, calls in zip(routers(model), maps, strict=True):
        stock, ours = (
            get_updated_expert_bias(count.clone(), torch.zeros(EXPERTS), 1.0, None)
            for count in (calls[0].sum(0).float(), router.local_tokens_per_expert)
        )
        assert torch.equal(stock, ours) and stock.any()


def test_bias_statistics_ignore_evaluation(megatron: Any) -> None:
    model = build_elastic(SPACE, torch.float32).eval()
    with torch.no_grad():
        run(model, one_hot(SPACE, SPACE.smallest(), torch.float32), tokens(SPACE, 3, 13))
    assert not any(router.local_tokens_per_expert.any() for router in routers(model))


def test_bias_statistics_ignore_a_dropped_layer(megatron: Any) -> None:
    space = ElasticSpace.build(
        SPACE.parent, {"num_layers": [2], "num_moe_experts": [4]}, layer_order=[0, 1, 2]
    )
    model = build_elastic(space, torch.float32).train()
    run(model, one_hot(space, spec_of(space, num_layers=2), torch.float32), tokens(space, 3, 13))
    kept, dropped = routers(model)
    assert kept.local_tokens_per_expert.any()
    assert not dropped.local_tokens_per_expert.any()


def test_the_bias_itself_is_untouched_by_a_pass(megatron: Any) -> None:
    model = build_elastic(SPACE, torch.float32).train()
    before = [router.expert_bias.clone() for router in routers(model)]
    run(model, one_hot(SPACE, SPACE.smallest(), torch.float32), tokens(SPACE, 3, 13)).sum().backward()
    for router, bias in zip(routers(model), before, strict=True):
        assert "expert_bias" in dict(router.named_buffers()) and "expert_bias" not in router.__dict__
        assert torch.equal(router.expert_bias, bias)
