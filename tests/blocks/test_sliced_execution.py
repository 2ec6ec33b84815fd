"""Law 5, second half: sliced execution is masked execution, in its result and in every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from laws import (
    HETEROGENEOUS,
    build_elastic,
    gradients,
    one_hot,
    recomputing,
    relative,
    run,
    scalar,
    soft_mix,
    spec_of,
    subspace,
    tokens,
    worst,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from elastic_megatron.blocks import SlicedModel, build_model
from elastic_megatron.ops import SubmodelMix, gumbel_noise, gumbel_softmax
from elastic_megatron.space import ElasticSpace

TIGHT = 1e-12
SPACE = subspace()
SPECS = {
    "full": SPACE.full(),
    "smallest": SPACE.smallest(),
    "heterogeneous": spec_of(SPACE, **HETEROGENEOUS),
    "shallow": spec_of(SPACE, num_layers=5, hidden_size=27),
    "shallow-heterogeneous": spec_of(SPACE, **(HETEROGENEOUS | {"num_layers": 4})),
    "narrow": spec_of(SPACE, hidden_size=16),
}

pytestmark = pytest.mark.usefixtures("fp64", "fresh_moe_globals")


@pytest.fixture(scope="module")
def model(megatron: Any) -> Any:
    return build_elastic(SPACE).train()


@dataclass
class Trace:
    """What a few micro-batches leave behind."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]
    counts: list[Tensor]


def masked(model: Any, mixes: list[SubmodelMix], batch: int = 2) -> Trace:
    return trace(model, mixes, batch, lambda mix, inputs: run(model, mix, inputs))


def sliced(model: Any, mixes: list[SubmodelMix], batch: int = 2, **kwargs: Any) -> Trace:
    submodels = SlicedModel(model, **kwargs)
    return trace(
        model, mixes, batch, lambda mix, inputs: submodels.forward(mix, *inputs, None), submodels.land
    )


def trace(
    model: Any,
    mixes: list[SubmodelMix],
    batch: int,
    forward: Callable[[SubmodelMix, tuple[Tensor, Tensor]], Tensor],
    finish: Callable[[], None] = lambda: None,
) -> Trace:
    """All forward passes, then all backward passes, last first: several micro-batches in flight."""
    model.zero_grad()
    for router in routers(model):
        if router.enable_expert_bias:
            router.local_tokens_per_expert = torch.zeros_like(router.expert_bias, dtype=torch.float32)
    outputs = [forward(mix, tokens(SPACE, batch, 11, seed)) for seed, mix in enumerate(mixes)]
    for seed, output in reversed(list(enumerate(outputs))):
        scalar(output, seed).backward()
    finish()
    found = gradients(model)
    for i, mix in enumerate(mixes):
        for a, p in mix.probs.items():
            found[f"mix {i} {a}"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    counts = [router.local_tokens_per_expert for router in routers(model) if router.enable_expert_bias]
    return Trace(outputs, found, counts)


def routers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


def assert_equal(found: Trace, expected: Trace) -> None:
    for mine, theirs in zip(found.outputs, expected.outputs, strict=True):
        assert theirs.std() > 0.05, "the comparison is about nothing"
        assert relative(mine, theirs) <= TIGHT
    assert worst(found.gradients, expected.gradients)[0] <= TIGHT
    for mine, theirs in zip(found.counts, expected.counts, strict=True):
        assert mine.dtype == theirs.dtype, "ranks would add numbers of different types"
        assert torch.equal(mine, theirs)


def drawn(seed: int) -> SubmodelMix:
    """What a hard budget router hands over: one-hot, with the gradient of soft probabilities."""
    probs = {}
    for a, p in soft_mix(SPACE, seed).probs.items():
        logits = p.detach().log().requires_grad_()
        probs[a] = gumbel_softmax(logits, gumbel_noise(("noise", seed, a), logits), 0.7, hard=True)
        probs[a].retain_grad()
    return SubmodelMix(SPACE, probs, hard=True)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", SPECS)
def test_sliced_execution_has_the_results_gradients_and_counts_of_masked(
    model: Any, name: str, batch: int
) -> None:
    mixes = [one_hot(SPACE, SPECS[name])]
    assert_equal(sliced(model, mixes, batch), masked(model, mixes, batch))


def test_several_submodels_in_flight(model: Any) -> None:
    mixes = [
        one_hot(SPACE, SPECS[name]) for name in ("smallest", "full", "heterogeneous", "smallest", "shallow")
    ]
    assert_equal(sliced(model, mixes), masked(model, mixes))


@pytest.mark.parametrize("seeds", [[1], [2], [3, 4, 3], [5, 6, 7]], ids=str)
def test_the_budget_router_gets_the_gradient_of_masked_execution(model: Any, seeds: list[int]) -> None:
    found = sliced(model, [drawn(s) for s in seeds])
    expected = masked(model, [drawn(s) for s in seeds])
    assert_equal(found, expected)
    axes = [a for a in SPACE.axes if expected.gradients[f"mix 0 {a}"].any()]
    assert len(axes) > 5, f"only {axes} have a gradient at all"


@pytest.mark.parametrize("hard", [False, True], ids=["frozen", "drawn"])
@pytest.mark.parametrize(("method", "layers"), [("uniform", 1), ("uniform", 3), ("block", 2)])
def test_recomputation_changes_nothing(model: Any, method: str, layers: int, hard: bool) -> None:
    def mixes() -> list[SubmodelMix]:
        if hard:
            return [drawn(8), drawn(9)]
        return [one_hot(SPACE, SPECS["heterogeneous"]), one_hot(SPACE, SPECS["smallest"])]

    expected = masked(model, mixes())
    with recomputing(model, method, layers):
        found = sliced(model, mixes())
    assert_equal(found, expected)


@pytest.mark.parametrize("settings", [
    {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.37},
    {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.37, "moe_z_loss_coeff": 0.11},
    {"moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False},
    {"moe_token_dispatcher_type": "allgather"},
], ids=lambda s: "-".join(str(v) for v in s.values()))  # fmt: skip
def test_sliced_equals_masked_with_other_routing(megatron: Any, settings: dict[str, Any]) -> None:
    model = build_elastic(SPACE, **settings).train()
    mixes = [one_hot(SPACE, SPECS[name]) for name in ("smallest", "heterogeneous")]
    assert_equal(sliced(model, mixes), masked(model, mixes))


@pytest.mark.parametrize("sizes", [{"tie_embeddings": True}, {"moe_shared_expert_intermediate_size": 0},
                                   {"num_query_groups": 1}, {"mamba_num_groups": 1}],
                         ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))  # fmt: skip
def test_sliced_equals_masked_for_model(megatron: Any, sizes: dict[str, Any]) -> None:
    parent = SPACE.parent.override(**sizes)
    choices = {a: list(SPACE.choices_of(a)[1:]) for a in SPACE.axes if parent.size(a)}
    space = ElasticSpace.build(parent, choices, layer_order=SPACE.layer_order)
    mixes, model = [one_hot(space, space.smallest())], build_elastic(space).train()
    assert_equal(sliced(model, mixes), masked(model, mixes))


@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "MM-*"])
def test_sliced_equals_masked_with_layers(megatron: Any, pattern: str) -> None:
    space = subspace(pattern)
    mixes, model = [one_hot(space, space.smallest())], build_elastic(space).train()
    assert_equal(sliced(model, mixes), masked(model, mixes))


def test_weights_are_read_anew_after_refresh_and_copies_given_back(model: Any) -> None:
    mix, inputs, submodels = one_hot(SPACE, SPECS["heterogeneous"]), tokens(SPACE, 2, 11), SlicedModel(model)
    with torch.no_grad():
        before = submodels.forward(mix, *inputs, None)
        for parameter in model.parameters():
            parameter.mul_(1.1)
        submodels.refresh()
        released = submodels._submodels[SPECS["heterogeneous"]].model
        assert all(p.untyped_storage().nbytes() == p.element_size() for p in released.parameters())
        after, expected = submodels.forward(mix, *inputs, None), run(model, mix, inputs)
        for parameter in model.parameters():
            parameter.div_(1.1)
    assert relative(after, expected) <= TIGHT
    assert relative(after, before) > 1e-3


def test_prefixes_are_views_that_cost_no_memory(model: Any) -> None:
    """Expert and embedding weights, the bulk of such models, are never copied."""
    submodel = SlicedModel(model).model_of(SPECS["smallest"])
    whole = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for name, parameter in submodel.named_parameters():
        if "experts.local_experts" in name or "embedding" in name or "output_layer" in name:
            assert parameter.untyped_storage().data_ptr() in whole, name


def test_gradients_go_where_ddp_collects_them_and_it_is_told(model: Any) -> None:
    mix, told = one_hot(SPACE, SPECS["heterogeneous"]), []
    expected = masked(model, [mix]).gradients
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float64)
    try:
        sliced(model, [mix], landed=told.append)
        assert not any(p.grad is not None for p in model.parameters())
        found = {n: p.main_grad for n, p in model.named_parameters()}
        assert worst(found, {n: expected[n] for n in found})[0] <= TIGHT
        assert len(told) == len({id(p) for p in told})
        assert {id(p) for p in told} >= {id(p) for p in model.parameters() if p.main_grad.any()}
    finally:
        for parameter in model.parameters():
            del parameter.main_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_full_budget_is_the_stock_model_bit_for_bit(
    megatron: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.undo()  # what keeps fp64
    elastic = build_elastic(SPACE, dtype).train()
    stock = build_model(SPACE.parent, dtype=dtype).train()
    stock.load_state_dict(elastic.state_dict())
    inputs = tokens(SPACE, 3, 13)
    mix = one_hot(SPACE, SPACE.full(), torch.float32)
    found, expected = SlicedModel(elastic).forward(mix, *inputs, None), stock(*inputs, None)
    assert torch.equal(found, expected)
    found.float().square().mean().backward()
    expected.float().square().mean().backward()
    mine, theirs = gradients(elastic), gradients(stock)
    assert all(torch.equal(mine[n], theirs[n]) for n in theirs)
