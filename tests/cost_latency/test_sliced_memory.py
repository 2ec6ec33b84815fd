"""Copies of weights that sliced execution makes: what is counted is what a submodel has of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from laws import HETEROGENEOUS, SHAPE, build_elastic, spec_of, subspace
from layout_shapes import NANO

from elastic_megatron.blocks import SlicedModel
from elastic_megatron.cost.rank_memory import Load, memory_per_rank
from elastic_megatron.cost.sliced_memory import Submodels
from elastic_megatron.recipe.training import Parallel
from elastic_megatron.space import ElasticSpace

SPACE = subspace()
SPECS = {
    "full": SPACE.full(),
    "smallest": SPACE.smallest(),
    "heterogeneous": spec_of(SPACE, **HETEROGENEOUS),
    "shallow": spec_of(SPACE, num_layers=5, hidden_size=27),
    "narrow": spec_of(SPACE, hidden_size=16),
}


@pytest.mark.parametrize("name", SPECS)
def test_what_is_counted_is_what_a_submodel_does_not_share(megatron: Any, name: str) -> None:
    """Without Transformer Engine, whose kernels take no strides."""
    model, spec = build_elastic(SPACE), SPECS[name]
    theirs = {t.untyped_storage().data_ptr() for t in model.state_dict().values() if t is not None}
    own = {
        n: t.numel()
        for n, t in SlicedModel(model).model_of(spec).state_dict().items()
        if t is not None and t.untyped_storage().data_ptr() not in theirs and "tokens_per_expert" not in n
    }
    counted = Submodels(SPACE, frozenset([spec]), dense=False).copied(Parallel(), range(SHAPE.num_layers))
    assert counted == sum(own.values()), own


def test_kernels_without_strides_have_every_narrowed_matrix_copied() -> None:
    """One dense layer whose columns are narrowed: rows alone are a view, columns are not."""
    parent = SHAPE.override(hybrid_layer_pattern="-", hidden_size=64, ffn_hidden_size=32)
    space = ElasticSpace.build(parent, {"hidden_size": [16, 64], "ffn_hidden_size": [8, 32]})
    small, tall = (spec_of(space, hidden_size=16, ffn_hidden_size=n) for n in (8, 32))
    short = spec_of(space, hidden_size=64, ffn_hidden_size=8)

    def copied(*specs: Any) -> float:
        return Submodels(space, frozenset(specs)).copied(Parallel(), [0])

    assert copied(small) == 2 * 8 * 16, "both matrices"
    assert copied(tall) == 32 * 16, "the second one keeps all its columns, and some of its rows"
    assert copied(short) == 64 * 8, "the first one keeps all its columns, and some of its rows"
    assert copied(small, tall, space.full()) == copied(small) + copied(tall)
    assert Submodels(space, frozenset([small]), dense=False).copied(Parallel(), [0]) == 0


def test_ranks_copy_what_they_hold() -> None:
    choices = {"hidden_size": [1344, 2688], "num_moe_experts": [64, 128], "mamba_num_heads": [32, 64]}
    space = ElasticSpace.build(NANO, choices, {"num_moe_experts": 8})
    one = Submodels(space, frozenset([space.smallest()]))
    whole = one.copied(Parallel(), range(NANO.num_layers))
    halves = [one.copied(Parallel(), part) for part in (range(26), range(26, NANO.num_layers))]
    assert whole == sum(halves) and 0 < halves[0] < whole
    experts = [i for i, s in enumerate(NANO.hybrid_layer_pattern) if s == "E"]
    split = one.copied(Parallel(expert=8), experts)
    assert one.copied(Parallel(), experts) / 8 < split < one.copied(Parallel(), experts) / 2
    assert one.copied(Parallel(tensor=3), experts) >= 0, "a layout that is refused elsewhere has a price too"


@pytest.mark.parametrize("pipeline", [1, 2])
def test_copies_are_part_of_a_ranks_weights(pipeline: int) -> None:
    space = ElasticSpace.build(NANO, {"hidden_size": [1344, 2688], "mamba_num_heads": [32, 64]})
    submodels = Submodels(space, frozenset([space.smallest(), space.full()]))
    parallel, load = Parallel(pipeline=pipeline), Load(64, 2, teacher=NANO)
    plain, sliced = (memory_per_rank(NANO, parallel, x) for x in (load, replace(load, sliced=submodels)))
    more = {
        part: sliced[part] - plain[part] for part in plain if part != "total" and sliced[part] != plain[part]
    }
    assert set(more) == {"weights"} and more["weights"] == sliced["total"] - plain["total"]
    if pipeline == 1:
        assert more["weights"] == 2 * submodels.copied(parallel, range(NANO.num_layers))
