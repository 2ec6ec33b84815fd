"""Costs: one formula for integers, for mixes and for real tensors, with exact gradients."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import HETEROGENEOUS, SHAPE, soft_mix, spec_of, subspace

from elastic_megatron.cost import account, metric, sizes_of_parent, sizes_of_spec
from elastic_megatron.cost.account import active_params, flops_per_token, total_params
from elastic_megatron.cost.memory import cache_bytes, peak_buffer_bytes, weight_bytes
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.space import BLOCKS, Budget, ElasticSpace, ParentShape, SubmodelSpec

GIB = 2**30
SPACE = subspace("MEM*E-M")
NANO = ParentShape(
    hybrid_layer_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=2688, vocab_size=131072, moe_ffn_hidden_size=1856, moe_shared_expert_intermediate_size=3712,
    num_moe_experts=128, moe_router_topk=6, mamba_num_heads=64, mamba_head_dim=64, mamba_state_dim=128,
    mamba_num_groups=8, num_attention_heads=32, num_query_groups=2, kv_channels=128,
)  # fmt: skip

FORMULAS: dict[str, Any] = {
    "total_params": total_params,
    "active_params": active_params,
    "flops": lambda m: flops_per_token(m, 512),
    "bf16": lambda m: weight_bytes(m, "bf16"),
    "fp8": lambda m: weight_bytes(m, "fp8"),
    "nvfp4": lambda m: weight_bytes(m, "nvfp4"),
    "cache": lambda m: cache_bytes(m, 512),
    "buffer": lambda m: peak_buffer_bytes(m, 3, 512),
    "memory": lambda m: metric(m, Budget("b", "memory_bytes", 0.5, format="fp8", batch_size=2)),
}


def random_spec(seed: int) -> SubmodelSpec:
    r = random.Random(seed)
    widths: dict[str, Any] = {}
    for a in SPACE.axes:
        choices = SPACE.choices_of(a)
        widths[a] = (
            [r.choice(choices) for _ in SPACE.layers(a)] if a in SPACE.per_layer else r.choice(choices)
        )
    return SubmodelSpec.of(widths)


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=40)
@given(seed=st.integers(0, 10**9))
def test_integer_widths_and_one_hot_mixes_cost_the_same(name: str, seed: int) -> None:
    spec = random_spec(seed)
    exact = FORMULAS[name](sizes_of_spec(SPACE, spec))
    mixed = FORMULAS[name](SubmodelMix.one_hot(SPACE, spec, dtype=torch.float64).sizes())
    assert float(mixed) == pytest.approx(float(exact), rel=1e-12)


def test_costs_of_integers_are_integers() -> None:
    cost = account(SPACE, spec_of(SPACE, **HETEROGENEOUS))
    assert type(cost.total_params) is int and type(cost.active_params) is int


def brute_force(space: ElasticSpace, spec: SubmodelSpec) -> dict[str, float]:
    """Costs by walking over tensors of the cut-out model, and over what an attention or SSM layer does."""
    parent = space.parent
    total = active = flops = 0.0
    hidden = spec["hidden_size"]
    assert isinstance(hidden, int)
    total += 2 * parent.vocab_size * hidden + hidden
    active += 2 * parent.vocab_size * hidden + hidden
    flops += 2 * parent.vocab_size * hidden
    for layer in space.kept_layers(spec):
        sizes = {
            **{k: v for k, v in parent.to_dict().items() if isinstance(v, int)},
            **space.layer_sizes(spec, layer),
        }
        for t in BLOCKS[parent.hybrid_layer_pattern[layer]]:
            numel = torch.empty(t.shape(sizes), device="meta").numel()
            copies, met = (sizes["num_moe_experts"], sizes["moe_router_topk"]) if t.per_expert else (1, 1)
            total += copies * numel
            active += met * numel
            flops += 2 * met * numel if t.role == "matmul" else 0
        if parent.hybrid_layer_pattern[layer] == "*":
            for _ in range(sizes["num_attention_heads"]):
                flops += 2 * (2 * sizes["kv_channels"] * 512 / 2)
        if parent.hybrid_layer_pattern[layer] == "M":
            inner = sizes["mamba_num_heads"] * sizes["mamba_head_dim"]
            states = sizes["mamba_num_groups"] * sizes["mamba_state_dim"]
            flops += 2 * sizes["conv_kernel"] * (inner + 2 * states) + 5 * inner * sizes["mamba_state_dim"]
    return {"total_params": total, "active_params": active, "flops": flops}


@settings(max_examples=30)
@given(st.integers(0, 10**9))
def test_costs_are_those_of_the_tensors(seed: int) -> None:
    spec = random_spec(seed)
    truth, model = brute_force(SPACE, spec), sizes_of_spec(SPACE, spec)
    for name, value in truth.items():
        assert FORMULAS[name](model) == value, name


@pytest.mark.parametrize("name", sorted(set(FORMULAS) - {"buffer", "memory"}))
def test_expected_costs_are_expectations(name: str) -> None:
    """The cost of a soft mix is the mean cost of the submodels it stands for (axes are independent)."""
    space = ElasticSpace.build(SHAPE, {"hidden_size": [16], "num_moe_experts": [4], "mamba_num_heads": [4],
                                       "num_layers": [5]}, per_layer=["num_moe_experts"])  # fmt: skip
    mix, mean = soft_mix(space, 11), 0.0
    for index in range(2**5):
        bits = [(index >> i) & 1 for i in range(5)]
        chance, widths = 1.0, {}
        for a, bit in zip(("hidden_size", "mamba_num_heads", "num_layers"), bits[:3], strict=True):
            widths[a] = space.choices_of(a)[bit]
            chance *= float(mix.probs[a][bit])
        widths["num_moe_experts"] = [space.choices_of("num_moe_experts")[b] for b in bits[3:]]
        for layer, b in enumerate(bits[3:]):
            chance *= float(mix.probs["num_moe_experts"][layer, b])
        mean += chance * float(FORMULAS[name](sizes_of_spec(space, SubmodelSpec.of(widths))))
    assert float(FORMULAS[name](mix.sizes())) == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("name", sorted(FORMULAS))
@pytest.mark.parametrize("seed", [0, 1])
def test_gradients_of_costs_are_their_slopes(name: str, seed: int) -> None:
    mix = soft_mix(SPACE, seed)
    FORMULAS[name](mix.sizes()).backward()
    g = torch.Generator().manual_seed(seed)
    step = 1e-5
    for a, p in mix.probs.items():
        direction = torch.randn(p.shape, generator=g, dtype=torch.float64)

        def moved(by: float, a: str = a, direction: torch.Tensor = direction) -> float:
            probs = {b: q.detach() + (by * direction if b == a else 0) for b, q in mix.probs.items()}
            return float(FORMULAS[name](SubmodelMix(SPACE, probs).sizes()))

        slope = float((p.grad * direction).sum()) if p.grad is not None else 0.0
        scale = abs(float(FORMULAS[name](mix.sizes())))
        assert slope == pytest.approx(
            (moved(step) - moved(-step)) / (2 * step), rel=1e-6, abs=1e-8 * scale
        ), a


def test_weights_of_nemotron_3_nano_in_its_official_formats() -> None:
    model = sizes_of_parent(NANO)
    assert weight_bytes(model, "nvfp4") / GIB == pytest.approx(18.00, abs=0.01)
    assert weight_bytes(model, "bf16") / GIB == pytest.approx(58.82, abs=0.01)
    assert weight_bytes(model, "bf16") == 2 * total_params(model)


def test_caches_of_nemotron_3_nano() -> None:
    """Keys and values of 6 layers x 2 heads x 128, BF16; fp32 states of 23 layers x 64 x 64 x 128."""
    kv = 6 * 2 * 2 * 2 * 128 * 1000
    ssm = 23 * (4 * 64 * 64 * 128 + 2 * 3 * (64 * 64 + 2 * 8 * 128))
    assert cache_bytes(sizes_of_parent(NANO), 1000) == kv + ssm


def test_the_largest_buffer_is_that_of_a_kept_layer() -> None:
    space = ElasticSpace.build(SHAPE.override(hybrid_layer_pattern="M-"), {"num_layers": [1]})
    mix = SubmodelMix.one_hot(space, space.smallest(), dtype=torch.float64)
    assert (
        float(peak_buffer_bytes(mix.sizes(), 1, 100))
        == 0
        == peak_buffer_bytes(sizes_of_spec(space, space.smallest()), 1, 100)
    )


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_smaller_submodels_never_cost_more(name: str) -> None:
    for seed in range(30):
        big, small = random_spec(seed), random_spec(1000 + seed)
        both = {a: [min(x, y) for x, y in zip(big[a], small[a], strict=True)] if isinstance(big[a], tuple)
                else min(big[a], small[a]) for a in SPACE.axes}  # fmt: skip
        inner = SubmodelSpec.of(both)
        assert inner <= big
        assert FORMULAS[name](sizes_of_spec(SPACE, inner)) <= FORMULAS[name](sizes_of_spec(SPACE, big))


def test_costs_of_a_space_are_those_of_the_shape() -> None:
    spec = spec_of(SPACE, hidden_size=16, num_moe_experts=4)
    assert account(SPACE, spec).total_params == account(SPACE.shape_of(spec)).total_params
    assert account(SPACE).to_dict() == account(SHAPE).to_dict()
