"""Layouts: every rule refuses one bad layout, good ones pass, and Megatron's own asserts agree."""

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layout_shapes import DENSE, NANO

from elastic_megatron.cost.layout import check_layout
from elastic_megatron.recipe.training import Parallel, Stage
from elastic_megatron.space import ElasticSpace, ParentShape


def space(lanes: int = 8, **choices: list[int]) -> ElasticSpace:
    choices = choices or {"num_moe_experts": [96, 112, 128], "mamba_num_heads": [48, 56, 64]}
    return ElasticSpace.build(
        NANO, choices, {"num_moe_experts": lanes} if "num_moe_experts" in choices else {}
    )


def stage(**changes: Any) -> Stage:
    return Stage(**{"name": "s", "tokens": 1, "seq_length": 64, "global_batch_size": 8} | changes)


@pytest.mark.parametrize(
    ("shape", "family", "layout", "stages"),
    [
        (NANO, None, {}, []),
        (NANO, space(), {"tensor": 2, "sequence": True, "expert": 8, "expert_tensor": 1, "context": 2}, []),
        (NANO, space(), {"pipeline": 4, "expert": 4, "world_size": 64}, [stage(global_batch_size=16)]),
        (NANO, space(), {"pipeline": 13, "virtual_pipeline": 2}, []),
        (NANO, space(), {"pipeline": 5}, []),
        (DENSE, None, {"pipeline": 2, "virtual_pipeline": 2, "world_size": 4}, [stage()]),
        (NANO, None, {"tensor": 4, "sequence": True, "context": 4}, [stage()]),
        (DENSE, None, {"tensor": 4, "pipeline": 3, "context": 2}, [stage()]),
        (DENSE, None, {"context": 8}, [stage()]),
    ],
)
def test_good_layouts_have_no_problems(
    shape: ParentShape, family: ElasticSpace | None, layout: dict[str, Any], stages: list[Stage]
) -> None:
    assert check_layout(shape, family, Parallel(**layout), stages) == []


MOE_TP = {"sequence": True, "expert_tensor": 1}


@pytest.mark.parametrize(
    ("shape", "family", "layout", "stages", "problem"),
    [
        (NANO, None, {"tensor": 2, "world_size": 3, **MOE_TP}, [],
         "world_size=3 is not a multiple of tensor 2 x pipeline 1 x context 1 = 2"),
        (NANO, None, {"expert": 8, "world_size": 4}, [],
         "world_size=4 is not a multiple of expert_tensor 1 x expert 8 x pipeline 1 = 8"),
        (NANO, None, {"sequence": True}, [], "sequence=true needs parallel.tensor above 1"),
        (NANO, None, {"tensor": 2}, [], "set parallel.sequence=true"),
        (DENSE, None, {"expert": 2}, [], "no MoE layers"),
        (replace(NANO, mamba_num_groups=1), None, {"tensor": 2, **MOE_TP}, [],
         "does not divide mamba_num_groups=1"),
        (replace(NANO, num_query_groups=8, num_attention_heads=24, mamba_num_groups=12, mamba_num_heads=36,
                 vocab_size=132, moe_shared_expert_intermediate_size=12), None, {"tensor": 3, **MOE_TP}, [],
         "tensor=3 does not divide num_query_groups=8 (nor the other way round)"),
        (replace(NANO, vocab_size=131073), None, {"tensor": 2, **MOE_TP}, [], "pad the vocabulary to 131074"),
        (replace(DENSE, ffn_hidden_size=1001), None, {"tensor": 2}, [],
         "tensor=2 does not divide ffn_hidden_size=1001"),
        (replace(DENSE, mamba_num_groups=8, num_query_groups=2), None, {"tensor": 8}, [],
         "tensor=8 does not divide num_attention_heads=12"),
        (NANO, None, {"expert_tensor": 128}, [],
         "expert_tensor=128 does not divide moe_ffn_hidden_size=1856"),
        (replace(NANO, moe_shared_expert_intermediate_size=3711), None, {"tensor": 2, **MOE_TP}, [],
         "does not divide moe_shared_expert_intermediate_size=3711"),
        (replace(NANO, num_moe_experts=100), None, {"expert": 8}, [],
         "expert=8 does not divide num_moe_experts=100"),
        (NANO, space(lanes=4, num_moe_experts=[100, 128]), {"expert": 8}, [],
         "expert=8 does not divide num_moe_experts=100 of a submodel; set parallel.expert=4"),
        (NANO, space(lanes=4), {"expert": 8}, [], "set space.lanes.num_moe_experts=8 and rank again, or set parallel.expert=4"),
        (NANO, space(num_attention_heads=[16, 32]), {"tensor": 4, **MOE_TP}, [],
         "set space.lanes.num_attention_heads=4 and rank again, or set parallel.tensor=2"),
        (NANO, None, {"context": 128}, [], "does not divide mamba_num_heads=64"),
        (NANO, space(), {"context": 32}, [], "does not divide mamba_num_heads=56"),
        (replace(NANO, mamba_num_groups=16, mamba_num_heads=96), None, {"context": 12}, [],
         "neither a divisor nor a multiple of the 16 SSM groups"),
        (NANO, None, {"pipeline": 53}, [], "parallel.pipeline=53 is more than the 52 layers"),
        (DENSE, None, {"pipeline": 2, "virtual_pipeline": 4}, [],
         "parallel.pipeline=2 x virtual_pipeline=4 = 8 is more than the 6 layers"),
        (NANO, None, {"virtual_pipeline": 2}, [], "virtual_pipeline needs parallel.pipeline above 1"),
        (NANO, None, {"context": 2}, [stage(seq_length=66)], "seq_length=66 is not a multiple of 4"),
        (NANO, None, {"tensor": 8, "context": 4, **MOE_TP}, [stage(seq_length=48)],
         "seq_length=48 is not a multiple of 32"),
        (NANO, None, {"world_size": 3}, [stage()],
         "global_batch_size=8 is not a multiple of micro_batch_size 1 x 3"),
        (NANO, None, {"pipeline": 4, "virtual_pipeline": 13, "world_size": 4}, [stage(global_batch_size=6)],
         "6 micro-batches a step are not a multiple of parallel.pipeline=4"),
    ],
)  # fmt: skip
def test_each_bad_layout_has_one_problem(
    shape: ParentShape, family: ElasticSpace | None, layout: dict[str, Any], stages: list[Stage], problem: str
) -> None:
    problems = check_layout(shape, family, Parallel(**layout), stages)
    assert len(problems) == 1, problems
    assert problem in problems[0] and "\n" not in problems[0] and ";" in problems[0]


class Group:
    """As much of a process group as a constructor asks."""

    def __init__(self, size: int) -> None:
        self._size = size

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return 0


def test_mamba_context_rules_are_megatrons() -> None:
    from megatron.core.ssm.mamba_context_parallel import MambaContextParallel

    empty = torch.empty(0)
    verdicts = set()
    for groups, heads, tensor, context in itertools.product(
        (2, 4, 6), (12, 24), (1, 2), (1, 2, 3, 4, 6, 8, 12)
    ):
        shape = replace(DENSE, mamba_num_groups=groups, mamba_num_heads=heads)
        try:
            MambaContextParallel(
                Group(context), heads // tensor * 16, heads // tensor, groups // tensor, 16,  # type: ignore[arg-type]
                empty, empty, 3, empty, empty, empty, False,
            )  # fmt: skip
            accepted = True
        except AssertionError:
            accepted = False
        problems = check_layout(shape, None, Parallel(tensor=tensor, context=context))
        assert (not problems) == accepted, (groups, heads, tensor, context, problems)
        verdicts.add(accepted)
    assert verdicts == {True, False}


def test_tensor_rules_are_those_of_transformer_config() -> None:
    from megatron.core.transformer import TransformerConfig

    shape = replace(DENSE, hybrid_layer_pattern="**", vocab_size=48, kv_channels=16)
    verdicts = set()
    for heads, groups, tensor in itertools.product((6, 12), (1, 2, 3, 6), (1, 2, 3, 4, 6, 12)):
        try:
            TransformerConfig(
                num_layers=2, hidden_size=256, num_attention_heads=heads, num_query_groups=groups,
                kv_channels=16, tensor_model_parallel_size=tensor,
            )  # fmt: skip
            accepted = True
        except ValueError:
            accepted = False
        model = replace(shape, num_attention_heads=heads, num_query_groups=groups)
        problems = check_layout(model, None, Parallel(tensor=tensor))
        assert (not problems) == accepted, (heads, groups, tensor, problems)
        verdicts.add(accepted)
    assert verdicts == {True, False}


def test_pipeline_split_is_megatrons_where_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.models.hybrid import hybrid_layer_allocation as allocation

    from elastic_megatron.cost.rank_memory import chunks_of_stage

    monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None: 0 if group is None else group.stage)
    monkeypatch.setattr(
        torch.distributed, "get_world_size", lambda group=None: 1 if group is None else group.stages
    )
    monkeypatch.setattr(allocation, "log_on_each_pipeline_stage", lambda *args, **kwargs: None)
    for stages in range(2, 7):
        parallel, group = Parallel(pipeline=stages), SimpleNamespace(stages=stages, stage=0)
        assert check_layout(DENSE, None, parallel) == []
        for group.stage in range(stages):
            if DENSE.num_layers % stages:
                with pytest.raises(ValueError, match="evenly divisible"):
                    allocation.select_pipeline_segment(DENSE.hybrid_layer_pattern, group, None)  # type: ignore[arg-type]
                continue
            chosen, _ = allocation.select_pipeline_segment(DENSE.hybrid_layer_pattern, group, None)  # type: ignore[arg-type]
            assert chunks_of_stage(DENSE, parallel, group.stage) == ["".join(chosen)]
