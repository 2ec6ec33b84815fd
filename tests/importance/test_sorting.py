"""Law 2: sorting changes no function; and what a submodel keeps is what the ranking put first."""

from __future__ import annotations

from itertools import accumulate
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from importance_models import (
    CHOICES,
    PARENT,
    build,
    logits,
    random_ranking,
    relative,
    sorted_state,
    space_of,
    tokens,
)
from torch.profiler import ProfilerActivity, profile

from elastic_megatron.checkpoint import shards
from elastic_megatron.checkpoint.slice import slice_state
from elastic_megatron.checkpoint.sort import sort_model, sort_orders, sort_space
from elastic_megatron.errors import UserError
from elastic_megatron.importance import collect, order_of
from elastic_megatron.ops.locate import weights
from elastic_megatron.space import ElasticSpace, ParentShape, SubmodelSpec, stored_order, undeal

EVERY = tuple(CHOICES)
WIDTHS = tuple(a for a in EVERY if a != "num_layers")


@pytest.fixture(scope="module")
def target(one_process):
    return build(seed=11)


def fill(target, tensors):
    found = target.load_state_dict(dict(tensors), strict=False)
    assert not found.unexpected_keys and all("_extra_state" in k for k in found.missing_keys)
    return target


@pytest.mark.parametrize("axes", [*((a,) for a in WIDTHS), EVERY], ids=lambda axes: "+".join(axes)[:36])
def test_law_2_sorting_leaves_logits_unchanged(model, target, axes):
    ids, space, state = tokens(), space_of(*axes), weights(model.state_dict())
    ranking = random_ranking(PARENT, axes, seed=len(axes))
    sort_model([fill(target, state)], space, ranking)
    moved = weights(target.state_dict())
    assert any(not torch.equal(moved[k], state[k]) for k in state), "nothing was sorted"
    assert relative(logits(target, ids), logits(model, ids)) < 1e-12
    truth = dict(sorted_state(space, ranking, state))
    assert truth.keys() == moved.keys() and all(torch.equal(moved[k], truth[k]) for k in truth)


@given(tile=st.integers(1, 4000))
@settings(max_examples=15, deadline=None)
def test_tiles_of_any_size_sort_alike(model, target, tile):
    """A tile is less than a row, or more than all experts of a layer."""
    space, state, ranking = space_of(*EVERY), weights(model.state_dict()), random_ranking(PARENT, EVERY)
    fill(target, state)
    with patch.object(shards, "TILE", tile):
        sort_model([target], space, ranking)
    moved = weights(target.state_dict())
    assert all(torch.equal(moved[k], v) for k, v in sorted_state(space, ranking, state))


@pytest.mark.parametrize("growth", [1, 3], ids=["tensors", "larger tensors"])
def test_sorting_takes_the_memory_of_a_few_tiles(growth):
    """Neither of the model, nor of its largest tensor, nor of the experts of a layer."""
    tile, sizes = 2048, {"vocab_size": 512 * growth, "moe_ffn_hidden_size": 64 * growth, "hidden_size": 128}
    parent = PARENT.override(**sizes)
    model, tensors = build(parent), {}
    for shard in shards.shards(model, parent):
        key = shard.layer, shard.layout.name
        tensors[key] = tensors.get(key, 0) + shard.tensor.numel()
    assert sum(n > 30 * tile for n in tensors.values()) >= 4, "tensors are no larger than tiles"
    space = ElasticSpace.build(
        parent, {a: [parent.size(a) // 2] for a in WIDTHS if a != "num_attention_heads"}
    )
    ranking = random_ranking(parent, space.axes)
    with patch.object(shards, "TILE", tile):
        assert peak(lambda: sort_model([model], space, ranking)) < 4 * tile * 8


def peak(run):
    """Most bytes that torch holds at a time during a call, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    return max(accumulate(e.nbytes() for e in events if e.name() == "[memory]"))


def test_law_2_for_a_measured_ranking(model, target):
    ids, space = tokens(), space_of(*EVERY)
    ranking = collect([model], PARENT, [{"tokens": ids}], axes=EVERY, depth_iterative=False)
    sort_model([fill(target, weights(model.state_dict()))], space, ranking)
    assert relative(logits(target, ids), logits(model, ids)) < 1e-12
    again = collect([target], PARENT, [{"tokens": ids}], axes=("hidden_size", "num_moe_experts"))
    for layer in PARENT.layers_of("E"):
        key = f"layers.{layer}.num_moe_experts"
        dealt = stored_order(ranking.orders[key].tolist(), space.lanes_of("num_moe_experts"))
        assert relative(again.scores[key], ranking.scores[key][dealt]) < 1e-6
    assert again.orders["hidden_size"].tolist() == list(range(PARENT.hidden_size)), "sorted is sorted"


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_first_k_of_every_lane_are_the_best_k_times_lanes_of_every_group(data):
    groups, per_group, block = (data.draw(st.integers(1, 4)) for _ in range(3))
    lanes, size = groups * per_group, groups * per_group * block
    score = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)))
    ranked = order_of(score.double(), groups).tolist()
    stored = stored_order(ranked, lanes, groups)
    k, members = data.draw(st.integers(0, block)), size // groups
    kept = [stored[lane * block + i] for lane in range(lanes) for i in range(k)]
    best = [
        sorted(range(g * members, (g + 1) * members), key=lambda c: (-int(score[c]), c))[: k * per_group]
        for g in range(groups)
    ]
    assert sorted(kept) == sorted(c for group in best for c in group)
    assert [stored[p] for p in undeal(size, lanes, groups)] == ranked


@given(choice=st.fixed_dictionaries({a: st.sampled_from([0, 1]) for a in EVERY}), seed=st.integers(0, 99))
@settings(max_examples=12, deadline=None)
def test_a_slice_of_the_sorted_model_holds_exactly_the_top_components(model, choice, seed):
    space = space_of(*EVERY)
    spec = SubmodelSpec.of({a: space.choices_of(a)[c] for a, c in choice.items()})
    ranking = random_ranking(PARENT, EVERY, seed)
    space, state = sort_space(space, ranking), weights(model.state_dict())
    cut = dict(slice_state(space, spec, sorted_state(space, ranking, state)))

    def top(key: str, axis: str) -> list[int]:
        order = ranking.orders[key].view(PARENT.groups(axis), -1)
        return sorted(order[:, : spec[axis] // PARENT.groups(axis)].flatten().tolist())

    hidden = sorted(top("hidden_size", "hidden_size"))
    rows = state["embedding.word_embeddings.weight"][:, hidden].sort(-1).values
    assert torch.equal(cut["embedding.word_embeddings.weight"].sort(-1).values, rows)
    layers = sorted(ranking.orders["num_layers"][: spec["num_layers"]].tolist())
    types = "".join(PARENT.hybrid_layer_pattern[i] for i in layers)
    for new, (old, symbol) in enumerate(zip(layers, types, strict=True)):
        mine = {k.split(f"layers.{new}.")[1]: v for k, v in cut.items() if f"decoder.layers.{new}." in k}
        theirs = {k.split(f"layers.{old}.")[1]: v for k, v in state.items() if f"decoder.layers.{old}." in k}
        if symbol == "M":
            heads = top(f"layers.{old}.mamba_num_heads", "mamba_num_heads")
            assert torch.equal(mine["mixer.A_log"].sort().values, theirs["mixer.A_log"][heads].sort().values)
            dims = top(f"layers.{old}.mamba_head_dim", "mamba_head_dim")
            gate = theirs["mixer.norm.weight"].view(PARENT.mamba_num_heads, -1)[heads][:, dims].flatten()
            assert torch.equal(mine["mixer.norm.weight"].sort().values, gate.sort().values)
            states = top(f"layers.{old}.mamba_state_dim", "mamba_state_dim")
            inner = PARENT.mamba_num_heads * PARENT.mamba_head_dim
            bias = theirs["mixer.conv1d_bias"][inner:].view(-1, PARENT.mamba_state_dim)[:, states].flatten()
            assert torch.equal(mine["mixer.conv1d_bias"][gate.numel() :].sort().values, bias.sort().values)
        elif symbol == "E":
            experts = top(f"layers.{old}.num_moe_experts", "num_moe_experts")
            found = mine["mlp.router.expert_bias"].tolist()
            assert sorted(found) == sorted(theirs["mlp.router.expert_bias"][experts].tolist())
            for e, mark in enumerate(found):
                source = theirs["mlp.router.expert_bias"].tolist().index(mark)
                order = ranking.orders[f"layers.{old}.moe_ffn_hidden_size"][source]
                up = theirs[f"mlp.experts.local_experts.{source}.linear_fc1.weight"]
                up = up[order[: spec["moe_ffn_hidden_size"]]][:, hidden].sum(-1)
                got = mine[f"mlp.experts.local_experts.{e}.linear_fc1.weight"].sum(-1)
                assert torch.allclose(got.sort().values, up.sort().values, atol=1e-12)


def test_layer_order_is_taken_only_where_depth_is_elastic():
    ranking = random_ranking(PARENT, EVERY)
    assert sort_space(space_of("hidden_size"), ranking).layer_order == tuple(range(PARENT.num_layers))
    sorted_one = sort_space(space_of("num_layers"), ranking)
    assert list(sorted_one.layer_order) == ranking.orders["num_layers"].tolist()


def test_rankings_of_other_models_are_refused():
    space = space_of("hidden_size", "ffn_hidden_size")
    with pytest.raises(UserError, match="lacks layers.5.ffn_hidden_size"):
        sort_orders(space, random_ranking(PARENT, ("hidden_size",)))
    with pytest.raises(UserError, match="of a model"):
        sort_orders(space, random_ranking(PARENT.override(hybrid_layer_pattern="MEM-E*"), space.axes))
    with pytest.raises(UserError, match="40 components, not 48"):
        wider = ParentShape(**{**PARENT.to_dict(), "ffn_hidden_size": 48})
        narrow = random_ranking(PARENT, ("ffn_hidden_size",))
        sort_orders(ElasticSpace.build(wider, {"ffn_hidden_size": [24]}), narrow)
