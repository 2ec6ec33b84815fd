"""Law 1: the masked parent and the sliced model compute the same logits, for every submodel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import (
    CHOICES,
    HETEROGENEOUS,
    build_elastic,
    build_slice,
    gradients,
    one_hot,
    recomputing,
    relative,
    run,
    spec_of,
    subspace,
    tokens,
    worst,
)

from elastic_megatron.blocks import build_model
from elastic_megatron.ops.locate import weights
from elastic_megatron.space import ElasticSpace, SubmodelSpec

TIGHT = 1e-12
SPACE = subspace()
ALONE = {f"{a}={w}": {a: w} for a, widths in CHOICES.items() for w in widths}
TOGETHER: dict[str, dict[str, Any]] = {
    "all": SPACE.smallest().to_dict(),
    "heterogeneous": HETEROGENEOUS,
    "heterogeneous-shallow": HETEROGENEOUS | {"num_layers": 4},
    "mamba-all": {"mamba_num_heads": 2, "mamba_head_dim": 3, "mamba_state_dim": 4},
    "moe-all": {"num_moe_experts": 4, "moe_ffn_hidden_size": 3, "moe_shared_expert_intermediate_size": 4},
    "hidden-and-heads": {"hidden_size": 16, "num_attention_heads": 2, "mamba_num_heads": 4},
}


@pytest.fixture(scope="module")
def model(megatron: Any) -> Any:
    return build_elastic(SPACE)


def agree(
    model: Any, space: ElasticSpace, spec: SubmodelSpec, batch: int, length: int, **overrides: Any
) -> None:
    inputs = tokens(space, batch, length)
    sliced = build_slice(model, space, spec, **overrides).train(model.training)
    with torch.no_grad():
        masked, cut = run(model, one_hot(space, spec), inputs), sliced(*inputs, None)
    assert cut.std() > 0.05, "the comparison is about nothing"
    assert relative(masked, cut) <= TIGHT


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("widths", [pytest.param(w, id=n) for n, w in ALONE.items()])
def test_masked_equals_sliced_one_axis(model: Any, widths: dict[str, int]) -> None:
    agree(model, SPACE, spec_of(SPACE, **widths), batch=1, length=13)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 131), (3, 13)])
@pytest.mark.parametrize("widths", [pytest.param(w, id=n) for n, w in TOGETHER.items()])
def test_masked_equals_sliced_many_axes(model: Any, widths: dict[str, Any], batch: int, length: int) -> None:
    agree(model, SPACE, spec_of(SPACE, **widths), batch, length)


@pytest.mark.usefixtures("fp64")
@pytest.mark.parametrize("name", ["all", "heterogeneous", "heterogeneous-shallow"])
@pytest.mark.parametrize(("method", "layers"), [("uniform", 1), ("uniform", 3), ("block", 2), (None, 1)])
def test_masked_equals_sliced_while_training(model: Any, method: str | None, layers: int, name: str) -> None:
    spec, inputs = spec_of(SPACE, **TOGETHER[name]), tokens(SPACE, 3, 13)
    sliced = build_slice(model, SPACE, spec).train()
    with recomputing(model.train(), method, layers):
        masked, cut = run(model, one_hot(SPACE, spec), inputs), sliced(*inputs, None)
    assert relative(masked, cut) <= TIGHT


@pytest.mark.usefixtures("fp64", "megatron")
@pytest.mark.parametrize("pattern", ["M", "*", "E", "-", "ME", "*-", "M*", "EE", "MM-*"])
def test_masked_equals_sliced_with_layers(pattern: str) -> None:
    space = subspace(pattern)
    agree(build_elastic(space), space, space.smallest(), batch=3, length=9)


@pytest.mark.usefixtures("fp64", "megatron")
@pytest.mark.parametrize("sizes", [{"tie_embeddings": True}, {"moe_shared_expert_intermediate_size": 0},
                                   {"moe_router_topk": 1}, {"num_query_groups": 6}, {"num_query_groups": 1},
                                   {"mamba_num_groups": 1}, {"conv_kernel": 4, "layernorm_epsilon": 1e-2}],
                         ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()))  # fmt: skip
def test_masked_equals_sliced_for_model(sizes: dict[str, Any]) -> None:
    attention = {"num_attention_heads": 12} if sizes.get("num_query_groups") == 6 else {}
    parent = SPACE.parent.override(**sizes, **attention)
    choices = {a: list(SPACE.choices_of(a)[1:]) for a in SPACE.axes if parent.size(a)}
    if attention:
        choices["num_attention_heads"] = [6]
    space = ElasticSpace.build(parent, choices, layer_order=SPACE.layer_order)
    agree(build_elastic(space), space, space.smallest(), batch=3, length=9)


@pytest.mark.usefixtures("fp64", "megatron")
@pytest.mark.parametrize("pre_softmax", [False, True])
def test_masked_equals_sliced_with_softmax_routing(pre_softmax: bool) -> None:
    space = subspace("MEE")
    overrides = dict(
        moe_router_score_function="softmax",
        moe_router_enable_expert_bias=False,
        moe_router_pre_softmax=pre_softmax,
    )
    model = build_elastic(space, **overrides)
    agree(model, space, space.smallest(), batch=3, length=9, **overrides)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mix", ["full", "none"])
def test_full_mix_is_the_stock_model_bit_for_bit(mix: str, dtype: torch.dtype) -> None:
    elastic = build_elastic(SPACE, dtype).train()
    stock = build_model(SPACE.parent, dtype=dtype).train()
    stock.load_state_dict(elastic.state_dict())
    inputs = tokens(SPACE, 3, 13)
    chosen = one_hot(SPACE, SPACE.full(), torch.float32) if mix == "full" else None
    a, b = run(elastic, chosen, inputs), stock(*inputs, None)
    assert torch.equal(a, b)
    a.float().square().mean().backward()
    b.float().square().mean().backward()
    mine, theirs = gradients(elastic), gradients(stock)
    if mix == "none":
        assert all(torch.equal(mine[n], theirs[n]) for n in theirs)
    else:  # one more node in the graph may change the order in which two gradients of a tensor are added
        assert worst(mine, theirs, floor=1e-3)[0] <= (1e-5 if dtype is torch.float32 else 5e-2)


@pytest.mark.usefixtures("megatron")
def test_masked_equals_sliced_in_fp32() -> None:
    model, spec, inputs = (
        build_elastic(SPACE, torch.float32),
        spec_of(SPACE, **HETEROGENEOUS),
        tokens(SPACE, 3, 13),
    )
    sliced = build_slice(model, SPACE, spec, torch.float32)
    with torch.no_grad():
        assert (
            relative(run(model, one_hot(SPACE, spec, torch.float32), inputs), sliced(*inputs, None)) <= 2e-6
        )


def test_weights_of_a_state_dict_are_the_models(model: Any) -> None:
    assert set(weights(model.state_dict())) == {n for n, _ in model.named_parameters()} | {
        f"decoder.layers.{i}.mlp.router.expert_bias" for i in SPACE.parent.layers_of("E")
    }
