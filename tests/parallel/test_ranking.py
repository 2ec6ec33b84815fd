"""Law 6 for ``rank``: of one data set every layout makes the ranking of one process, and sorts in place."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranking_jobs as jobs
import torch
from hf_files import write_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, Layout
from pool import RankError
from torch import Tensor

from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.slice import permute_state
from elastic_megatron.checkpoint.sort import sort_orders
from elastic_megatron.importance import Ranking, order_of
from elastic_megatron.space import AXIS_NAMES, ParentShape, axis

# Layouts that differ only in what training does are one here: a pass over data needs no virtual pipeline, no
# optimizer and no recomputation.
_SEEN = ("tensor", "sequence", "pipeline", "context", "expert", "expert_tensor", "dispatcher")
CASES: dict[tuple[Any, ...], list[Layout]] = {}
for _layout in LAYOUTS:
    CASES.setdefault((_layout.world, *(_layout.parallel.get(key) for key in _SEEN)), []).append(_layout)
# beside them: data-parallel ranks that share the experts' channels
CASES["ETP2",] = [Layout("ETP2", 2, {"expert_tensor": 2}, "")]
every_layout = pytest.mark.parametrize("layouts", CASES.values(), ids=lambda same: same[0].name)
# the batch that ranks layers has one row, which does not divide among data-parallel ranks
ONE_ROW = {"ETP2", "PP2+DP2"}
# for tensor ranks that share no sequence; here each of them has half a KV group
DENSE = jobs.PARENT.override(
    hybrid_layer_pattern="M*-", num_query_groups=1, num_moe_experts=0, moe_router_topk=0, moe_ffn_hidden_size=0,
    moe_shared_expert_intermediate_size=0, moe_router_topk_scaling_factor=1.0,
)  # fmt: skip
TIED = jobs.PARENT.override(tie_embeddings=True)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(8, 20)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> dict[ParentShape, Path]:
    """A Hugging Face directory of each model."""
    paths = {}
    for parent in (jobs.PARENT, DENSE, TIED):
        paths[parent] = tmp_path_factory.mktemp("parent") / "hf"
        write_hf(paths[parent], Manifest(shape=parent), jobs.random_state(parent, seed=0).items())
    return paths


@pytest.fixture(scope="module")
def truth(ranks: Any, hf: dict[ParentShape, Path], ids: Tensor) -> dict[ParentShape, Ranking]:
    """What one process makes of the data."""
    return {parent: ranked(ranks, 1, {}, hf[parent], parent, ids)[0] for parent in (jobs.PARENT, DENSE)}


def random_ids(rows: int, length: int) -> Tensor:
    return torch.randint(
        0, jobs.PARENT.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3)
    )


def ranked(
    ranks: Any,
    world: int,
    parallel: Mapping[str, Any],
    hf: Path,
    parent: ParentShape,
    ids: Tensor,
    rows: int = 2,
) -> list[Ranking]:
    axes = [a for a in AXIS_NAMES if parent.size(a)]
    return ranks.run(jobs.ranked, world, parallel, hf, ids, axes, rows=rows, iterative=True)


def random_ranking(parent: ParentShape) -> Ranking:
    generator, scores = torch.Generator().manual_seed(5), {}
    for a in AXIS_NAMES:
        symbol = axis(a).symbol
        for key in [f"layers.{i}.{a}" for i in parent.layers_of(symbol)] if symbol else [a]:
            experts = (parent.num_moe_experts,) if a == "moe_ffn_hidden_size" else ()
            scores[key] = torch.rand(*experts, parent.size(a), generator=generator, dtype=torch.float64)
    orders = {k: order_of(v, parent.groups(k.rpartition(".")[2])) for k, v in scores.items()}
    return Ranking(scores, orders, {}, parent.hybrid_layer_pattern, 0, "")


def assert_same(found: Ranking, truth: Ranking) -> None:
    assert found.orders.keys() == truth.orders.keys()
    for key, score in truth.scores.items():
        assert torch.equal(found.orders[key], truth.orders[key]), key
        torch.testing.assert_close(found.scores[key], score, rtol=1e-6, atol=0, msg=key)
    assert {i: t.tolist() for i, t in found.tokens.items()} == {
        i: t.tolist() for i, t in truth.tokens.items()
    }
    assert (found.token_count, found.data_digest) == (truth.token_count, truth.data_digest)


def assert_equal(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys()
    assert not [name for name in truth if not torch.equal(found[name], truth[name])]


@every_layout
def test_every_layout_makes_the_ranking_of_one_process(ranks, record, hf, ids, truth, layouts):
    layout, parent = claimed(record, layouts, "ranking"), jobs.PARENT if layouts[0].moe else DENSE
    rows = 1 if layout.name in ONE_ROW else 2
    found = ranked(ranks, layout.world, layout.parallel, hf[parent], parent, ids, rows)
    assert_same(found[0], truth[parent])
    assert len({ranking.digest() for ranking in found}) == 1, "ranks disagree"


def test_a_pass_for_depth_alone_reads_on_replicas_what_it_reads_on_one(ranks, hf, ids):
    axes, how = ["num_layers"], {"rows": 2, "iterative": False}
    (alone,) = ranks.run(jobs.ranked, 1, {}, hf[jobs.PARENT], ids, axes, **how)
    found = ranks.run(jobs.ranked, 2, {}, hf[jobs.PARENT], ids, axes, **how)
    assert_same(found[0], alone)
    assert alone.token_count == 2 * ids.shape[1]


def test_experts_that_get_every_token_from_all_tensor_ranks_are_refused(ranks, hf, ids):
    with pytest.raises(RankError, match="parallel.tensor=2 without parallel.sequence"):
        ranked(ranks, 2, {"tensor": 2}, hf[jobs.PARENT], jobs.PARENT, ids)


@every_layout
def test_a_model_filled_and_sorted_where_it_is_sharded_is_the_whole_one_bit_for_bit(
    ranks, record, hf, ids, tmp_path, layouts
):
    """The pipeline's last stage has its own copy of a tied embedding."""
    layout = claimed(record, layouts, "sort")
    parent = DENSE if not layout.moe else TIED if layout.name == "PP2" else jobs.PARENT
    space, ranking, state = jobs.space_of(parent), random_ranking(parent), dict(read_hf(hf[parent]).state())
    found = ranks.run(
        jobs.filled_and_sorted, layout.world, layout.parallel, hf[parent], space, ranking, tmp_path, ids
    )
    ((filled, moved),) = ranks.run(jobs.loaded, 1, tmp_path / "iter_0000000", tmp_path / "iter_0000001")
    assert_equal(filled, state)
    assert_equal(moved, dict(permute_state(parent, sort_orders(space, ranking), state.items())))
    total, changed = found[0]
    assert total > 0 and changed / total < 1e-10, "sorting changed the function"


def claimed(record: Callable[[str, str], None], layouts: list[Layout], proves: str) -> Layout:
    for layout in layouts:
        if layout in LAYOUTS:
            record(layout.name, proves)
    return layouts[0]


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_an_exchange_is_index_select_of_the_whole(ranks, data):
    world, own, dims = (
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
    )
    dim, dtype = (
        data.draw(st.integers(0, dims - 1)),
        data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
    )
    shape = [data.draw(st.integers(1, 3)) for _ in range(dims)]
    shape[dim] = world * own
    source = data.draw(st.permutations(range(world * own)))
    whole = torch.randn(shape).to(dtype)
    parts = ranks.run(jobs.exchanged, world, whole, dim, source)
    assert all(part.shape[dim] == own for part in parts)
    assert torch.equal(torch.cat(parts, dim), whole.index_select(dim, torch.tensor(source)))


@pytest.fixture(scope="module")
def recipe(hf: dict[ParentShape, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("data") / "tokens"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(random_ids(1, 200)[0].numpy(), [200])
    builder.finalize(f"{prefix}.idx")
    space = jobs.space_of(jobs.PARENT).to_dict()
    return {
        "model": {"hf": str(hf[jobs.PARENT]), "dtype": "fp32"},
        "data": {"train": [{"path": str(prefix), "weight": 1}]},
        "space": {"choices": space["choices"], "lanes": jobs.LANES},
        "rank": {"samples": 4, "seq_length": 20, "micro_batch_size": 2, "depth": True},
    }


def write(recipe: dict[str, Any], run_dir: Path, **sections: Any) -> Path:
    path = run_dir.with_suffix(".yaml")
    path.write_text(json.dumps(recipe | {"name": "tiny", "run_dir": str(run_dir)} | sections))
    return path


def test_the_command_ranks_on_many_ranks_as_on_one_and_speaks_once(ranks, recipe, hf, tmp_path):
    one = write(recipe, tmp_path / "one")
    four = write(recipe, tmp_path / "four", parallel={"pipeline": 2, "virtual_pipeline": 2, "expert": 2})
    assert [status for status, _, _ in ranks.run(jobs.commanded, 1, "rank", str(one))] == [0]
    said = ranks.run(jobs.commanded, 4, "rank", str(four))
    assert [status for status, _, _ in said] == [0] * 4
    assert "ranked on 80 tokens" in said[0][1] and not any(out for _, out, _ in said[1:])
    alone, found = Ranking.load(tmp_path / "one"), Ranking.load(tmp_path / "four")
    for key, score in alone.scores.items():  # in fp32 two components may be too close to call
        torch.testing.assert_close(found.scores[key], score, rtol=1e-4, atol=1e-7, msg=key)
    ((moved,),) = ranks.run(jobs.loaded, 1, tmp_path / "four" / "checkpoints" / "iter_0000000")
    space, state = jobs.space_of(jobs.PARENT), read_hf(hf[jobs.PARENT]).state()
    assert_equal(moved, dict(permute_state(jobs.PARENT, sort_orders(space, found), state)))


def test_samples_that_do_not_divide_among_data_parallel_ranks_are_refused(ranks, recipe, tmp_path):
    path = write(recipe, tmp_path / "run", rank=recipe["rank"] | {"samples": 6})
    for status, out, err in ranks.run(jobs.commanded, 2, "rank", str(path)):
        assert (status, out) == (2, "")
        assert "rank.samples=6 is not a multiple of micro_batch_size 2 x 2 data-parallel ranks" in err
