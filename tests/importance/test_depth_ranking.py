"""Depth scores are nMSE against real models in which the layer does not exist."""

from __future__ import annotations

import pytest
import torch
from importance_models import build, exact, logits, tokens
from torch import Tensor, nn

from elastic_megatron.importance import collect
from elastic_megatron.space import ElasticSpace, ParentShape, SubmodelSpec

PATTERN = "ME*-M"
SHAPE = ParentShape(
    PATTERN, 32, 97, ffn_hidden_size=24, moe_ffn_hidden_size=16, num_moe_experts=4, moe_router_topk=2,
    mamba_num_heads=4, mamba_head_dim=4, mamba_state_dim=8, mamba_num_groups=2,
    num_attention_heads=4, num_query_groups=2, kv_channels=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def small(one_process: None) -> nn.Module:
    return build(SHAPE, seed=7)


def nmse_without(small: nn.Module, ids: Tensor, dropped: list[int]) -> float:
    """Build and fill the model that lacks ``dropped``; compare its logits with the parent's."""
    from elastic_megatron.blocks import build_sliced_model
    from elastic_megatron.checkpoint.slice import slice_state
    from elastic_megatron.ops.locate import weights

    kept = [i for i in range(len(PATTERN)) if i not in dropped]
    space = ElasticSpace.build(SHAPE, {"num_layers": [len(kept)]}, layer_order=[*kept, *dropped])
    spec = SubmodelSpec.of({"num_layers": len(kept)})
    model = build_sliced_model(space, spec, dtype=torch.float64)
    model.load_state_dict(dict(slice_state(space, spec, weights(small.state_dict()).items())), strict=False)
    full = logits(small, ids)
    return float((full - logits(model, ids)).square().sum() / full.square().sum())


def ranked(small: nn.Module, batches: list[Tensor], iterative: bool):
    with exact():
        return collect(
            [small], SHAPE, [{"tokens": b} for b in batches], axes=["num_layers"], depth_batches=2,
            depth_iterative=iterative,
        )  # fmt: skip


def test_each_layer_alone(small):
    ids = tokens(6)
    ranking = ranked(small, [ids[:1], ids[1:4], ids[4:]], iterative=False)
    truth = [nmse_without(small, ids[:4], [j]) for j in range(len(PATTERN))]
    assert ranking.scores["num_layers"].tolist() == pytest.approx(truth, rel=1e-10)
    assert ranking.orders["num_layers"].tolist() == sorted(range(len(PATTERN)), key=lambda j: -truth[j])
    assert ranking.token_count == ids[:4].numel(), "a pass for depth alone reads no more than it needs"


def test_iterative_drops_the_least_important_layer_and_measures_again(small):
    ids = tokens(2)
    ranking = ranked(small, [ids], iterative=True)
    dropped: list[int] = []
    scores = {}
    while len(dropped) < len(PATTERN) - 1:
        errors = {j: nmse_without(small, ids, [*dropped, j]) for j in range(len(PATTERN)) if j not in dropped}
        worst = min(errors, key=errors.__getitem__)
        scores[worst] = errors[worst]
        dropped.append(worst)
    order = ranking.orders["num_layers"].tolist()
    assert order[:0:-1] == dropped and sorted(order) == list(range(len(PATTERN)))
    for j, score in scores.items():
        assert float(ranking.scores["num_layers"][j]) == pytest.approx(score, rel=1e-10)


def test_layers_that_do_nothing_go_first_and_tie_by_index(small):
    model = build(SHAPE, seed=8)
    with torch.no_grad():
        model.decoder.layers[0].mixer.out_proj.weight.zero_()
        model.decoder.layers[3].mlp.linear_fc2.weight.zero_()
    for iterative in (False, True):
        ranking = ranked(model, [tokens(2)], iterative)
        assert ranking.orders["num_layers"][-2:].tolist() == [0, 3]
        assert ranking.scores["num_layers"][[0, 3]].tolist() == [0, 0]
        assert ranking.unseen()["num_layers"] == [0, 3]
