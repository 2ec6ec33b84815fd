"""Law 3: counted parameters are the published ones, and the number of elements of the real module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import HETEROGENEOUS, SHAPE, spec_of, subspace
from torch.overrides import TorchFunctionMode

from elastic_megatron.blocks import build_model, build_sliced_model, transformer_config
from elastic_megatron.checkpoint.stored import model_tensors
from elastic_megatron.cost import account
from elastic_megatron.ops.locate import weights
from elastic_megatron.space import ElasticSpace, ParentShape

NANO_3_30B = ParentShape(
    hybrid_layer_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=2688, vocab_size=131072, moe_ffn_hidden_size=1856, moe_shared_expert_intermediate_size=3712,
    num_moe_experts=128, moe_router_topk=6, moe_router_topk_scaling_factor=2.5, mamba_num_heads=64,
    mamba_head_dim=64, mamba_state_dim=128, mamba_num_groups=8, num_attention_heads=32, num_query_groups=2,
    kv_channels=128,
)  # fmt: skip
NANO_V2_12B = ParentShape(
    hybrid_layer_pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    hidden_size=5120, vocab_size=131072, ffn_hidden_size=20480, mamba_num_heads=128, mamba_head_dim=80,
    mamba_state_dim=128, mamba_num_groups=8, num_attention_heads=40, num_query_groups=8, kv_channels=128,
)  # fmt: skip


def test_nemotron_3_nano_30b_has_its_published_parameters() -> None:
    cost = account(NANO_3_30B)
    assert (cost.total_params, cost.active_params) == (31_577_940_288, 3_580_076_352)


def test_nemotron_nano_v2_12b_has_its_published_parameters() -> None:
    cost = account(NANO_V2_12B)
    assert cost.total_params == cost.active_params == 12_310_001_152


def test_the_published_minitron_child_has_its_parameters() -> None:
    """22.28B total and 3.00B active: hidden 2304, 104 experts, shared 3072, found in ModelOpt's examples."""
    child = NANO_3_30B.override(
        hidden_size=2304, num_moe_experts=104, moe_shared_expert_intermediate_size=3072
    )
    cost = account(child)
    assert (round(cost.total_params / 1e9, 2), round(cost.active_params / 1e9, 2)) == (22.28, 3.00)
    space = ElasticSpace.build(
        NANO_3_30B,
        {"hidden_size": [2304], "num_moe_experts": [104], "moe_shared_expert_intermediate_size": [3072]},
    )
    assert account(space, space.smallest()) == cost


def numel(model: torch.nn.Module) -> int:
    """Parameters and the moe_router's correction bias, as published counts do."""
    return sum(t.numel() for t in weights(model.state_dict()).values())


class OnMeta(TorchFunctionMode):
    """Every new tensor has a shape and no memory, also where its device is named."""

    FACTORIES = frozenset(
        {"arange", "as_tensor", "empty", "full", "ones", "rand", "randn", "tensor", "zeros"}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = {"device": "meta"} if func.__name__ in self.FACTORIES else {}
        return func(*args, **{**(kwargs or {}), **device})


@pytest.mark.usefixtures("megatron")
def test_counts_of_the_30b_are_those_of_the_real_module() -> None:
    """Megatron's whole model, every tensor of it."""
    config = transformer_config(NANO_3_30B, torch.bfloat16, perform_initialization=False)
    with OnMeta():
        model = build_model(NANO_3_30B, dtype=torch.bfloat16, config=config)
    assert all(p.is_meta for p in model.parameters())
    assert numel(model) == account(NANO_3_30B).total_params == 31_577_940_288
    found = {name: tuple(t.shape) for name, t in weights(model.state_dict()).items()}
    assert found == {t.name: t.shape for t in model_tensors(NANO_3_30B)}


SIZES = st.fixed_dictionaries(
    {
        "hybrid_layer_pattern": st.text("M*E-", min_size=1, max_size=4),
        "hidden_size": st.integers(3, 19),
        "vocab_size": st.integers(5, 23),
        "ffn_hidden_size": st.integers(1, 9),
        "moe_ffn_hidden_size": st.integers(1, 9),
        "moe_shared_expert_intermediate_size": st.integers(0, 9),
        "num_moe_experts": st.integers(2, 5),
        "moe_router_topk": st.integers(1, 2),
        "mamba_head_dim": st.integers(1, 5),
        "mamba_state_dim": st.integers(1, 5),
        "mamba_num_groups": st.integers(1, 3),
        "num_query_groups": st.integers(1, 3),
        "kv_channels": st.integers(1, 5),
        "tie_embeddings": st.booleans(),
    }
)


@pytest.mark.usefixtures("megatron")
@settings(max_examples=40)
@given(SIZES, st.integers(1, 3), st.integers(1, 3))
def test_counts_are_those_of_the_real_module(sizes: dict[str, Any], heads: int, queries: int) -> None:
    shape = ParentShape(
        **sizes,
        mamba_num_heads=heads * sizes["mamba_num_groups"],
        num_attention_heads=queries * sizes["num_query_groups"],
    )
    model = build_model(shape)
    assert numel(model) == account(shape).total_params
    found = {name: tuple(t.shape) for name, t in weights(model.state_dict()).items()}
    assert found == {t.name: t.shape for t in model_tensors(shape)}


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("widths", [{}, {"num_layers": 4}, HETEROGENEOUS, HETEROGENEOUS | {"num_layers": 5}],
                         ids=["full", "shallow", "heterogeneous", "heterogeneous-shallow"])  # fmt: skip
def test_counts_of_a_submodel_are_those_of_its_module(widths: dict[str, Any]) -> None:
    space = subspace()
    spec = spec_of(space, **widths)
    assert numel(build_sliced_model(space, spec)) == account(space, spec).total_params


def test_active_parameters_leave_out_the_unrouted_experts() -> None:
    cost = account(SHAPE)
    unrouted = SHAPE.num_moe_experts - SHAPE.moe_router_topk
    assert (
        cost.total_params - cost.active_params
        == 2 * unrouted * 2 * SHAPE.hidden_size * SHAPE.moe_ffn_hidden_size
    )
