"""Law 9, without ModelOpt: an elastic model is the stock model but for three documented classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import build_elastic, one_hot, subspace, tokens
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.moe.router import TopKRouter

from elastic_megatron import runtime
from elastic_megatron.blocks import (
    ElasticHybridStack,
    build_elastic_model,
    build_model,
    elastic_hybrid_stack_spec,
    elastic_stack,
    running,
)
from elastic_megatron.blocks.mixers import ElasticMambaMixer, ElasticTopKRouter

SPACE = subspace()
OURS = {ElasticHybridStack: HybridStack, ElasticMambaMixer: MambaMixer, ElasticTopKRouter: TopKRouter}


@pytest.fixture(scope="module")
def pair(megatron: Any) -> tuple[Any, Any]:
    return build_elastic(SPACE, torch.float32), build_model(SPACE.parent)


def test_every_other_leaf_is_the_stock_class(pair: tuple[Any, Any]) -> None:
    elastic, stock = (dict(m.named_modules()) for m in pair)
    assert list(elastic) == list(stock)
    for name, module in elastic.items():
        assert OURS.get(type(module), type(module)) is type(stock[name]), name
    assert {type(m) for m in elastic.values()} >= set(OURS)


def test_no_forward_of_a_leaf_is_overridden(pair: tuple[Any, Any]) -> None:
    for cls, base in OURS.items():
        if cls is not ElasticHybridStack:
            assert "forward" not in vars(cls) and cls.forward is base.forward
    for name, module in pair[0].named_modules():
        assert "forward" not in vars(module), f"{name} carries a forward of its own"


def test_state_dict_keys_and_shapes_are_those_of_stock(pair: tuple[Any, Any]) -> None:
    elastic, stock = (m.state_dict() for m in pair)
    assert list(elastic) == list(stock)
    for name, value in stock.items():
        assert getattr(elastic[name], "shape", None) == getattr(value, "shape", None), name


def test_sharded_keys_are_those_of_stock(pair: tuple[Any, Any]) -> None:
    metadata = {"singleton_local_shards": False, "dp_cp_group": runtime.groups().dp_cp}
    keys = [
        sorted((k, getattr(v, "key", None)) for k, v in m.sharded_state_dict(metadata=dict(metadata)).items())
        for m in pair
    ]
    assert keys[0] == keys[1]


def test_the_elastic_spec_leaves_the_stock_spec_alone(megatron: Any) -> None:
    stock = runtime.hybrid_stack_spec()
    before = repr(stock)
    elastic_hybrid_stack_spec(SPACE, stock)
    assert repr(stock) == before


def test_the_elastic_spec_refuses_a_spec_that_is_elastic_already(megatron: Any) -> None:
    spec = elastic_hybrid_stack_spec(SPACE, runtime.hybrid_stack_spec())
    with pytest.raises(ValueError, match="HybridStack"):
        elastic_hybrid_stack_spec(SPACE, spec)


REFUSED: dict[str, dict[str, Any]] = {
    "selective recomputation of layers": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "selective recomputation of MLPs": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "multi-token prediction": {"mtp_num_layers": 1},
    "latent experts": {"moe_latent_size": 8},
    "sinkhorn": {
        "moe_router_load_balancing_type": "sinkhorn", "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
    },
    "groups of experts": {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
    "global auxiliary loss": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("overrides", [pytest.param(o, id=n) for n, o in REFUSED.items()])
def test_configurations_that_cannot_be_elastic_are_refused(megatron: Any, overrides: dict[str, Any]) -> None:
    build_model(SPACE.parent, **overrides)
    with pytest.raises(ValueError) as caught:
        build_elastic_model(SPACE, **overrides)
    assert "\n" not in str(caught.value)


def test_fp8_and_router_fusion_are_refused_at_construction(megatron: Any) -> None:
    """Megatron refuses both on a CPU, so they are set on the config of a built model."""
    from elastic_megatron.blocks.binding import Binding
    from elastic_megatron.blocks.stack import _refuse

    model = build_elastic_model(SPACE)
    config = elastic_stack(model).config
    _refuse(config)
    for field, value in (("fp8", "e4m3"), ("fp4", "e2m1")):
        before = getattr(config, field)
        setattr(config, field, value)
        with pytest.raises(ValueError, match="ModelOpt"):
            _refuse(config)
        setattr(config, field, before)
    config.moe_router_fusion = True
    with pytest.raises(ValueError, match="unfused"):
        model.decoder.layers[1].mlp.router.bind(Binding(), SPACE)


@pytest.mark.parametrize("flag", ["_with_fused_impl", "use_fused_mlp"])
def test_a_fused_mlp_is_refused(megatron: Any, flag: str) -> None:
    from elastic_megatron.blocks.binding import attach

    model = build_model(SPACE.parent)
    setattr(model.decoder.layers[5].mlp, flag, True)
    with pytest.raises(ValueError, match="linear_fc2"):
        attach(model.decoder.layers[5], "-", SPACE)


def test_running_finds_the_stack_through_wrappers_and_refuses_stock(pair: tuple[Any, Any]) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

    elastic, stock = pair
    assert elastic_stack(Wrapper(Wrapper(elastic))) is elastic.decoder
    with pytest.raises(ValueError, match="elastic_hybrid_stack_spec"):
        running(stock, None)


def test_hooks_hold_nothing_between_passes(pair: tuple[Any, Any]) -> None:
    elastic = pair[0]
    with running(elastic, one_hot(SPACE, SPACE.smallest(), torch.float32)):
        elastic(*tokens(SPACE), None)
        assert all(b.widths is None for b in (*elastic.decoder.bindings, elastic.decoder.ends))
    assert elastic.decoder._mix is None
