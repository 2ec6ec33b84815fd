"""What ``launches.py`` counts is what was asked for, and elastic steps make the host wait no more than stock ones."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_megatron.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"
# a process of its own, which takes itself for one rank of eight
TINY = """
import json, sys
sys.path[:0] = sys.argv[1:]
import paper_steps
from elastic_megatron.space import ElasticSpace, ParentShape
shape = ParentShape("M*E", hidden_size=64, vocab_size=128, ffn_hidden_size=32, moe_ffn_hidden_size=32,
    moe_shared_expert_intermediate_size=32, num_moe_experts=16, moe_router_topk=2, mamba_num_heads=8,
    mamba_head_dim=8, mamba_state_dim=16, mamba_num_groups=2, num_attention_heads=4, num_query_groups=2, kv_channels=16)
small = {"hidden_size": 32, "moe_ffn_hidden_size": 16, "num_moe_experts": 8, "mamba_num_heads": 4}
choices = {a: sorted((w, shape.size(a))) for a, w in small.items()}
setting = paper_steps.Setting(ElasticSpace.build(shape, choices, {"num_moe_experts": 8}), small, 32)
paper_steps.start()
found = {name: paper_steps.count(name, setting).as_json() for name in paper_steps.STEPS}
for pattern in ("MM*E", "M*EE", "MM*EE"):
    found[pattern] = paper_steps.count("elastic, soft", setting.of(pattern)).as_json()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def tools() -> Iterator[Any]:
    before = list(sys.path)
    sys.path[:0] = [str(TOOLS / "benchmarks"), str(TOOLS)]
    yield importlib.import_module
    sys.path[:] = before


@pytest.fixture(scope="module")
def steps() -> dict[str, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", TINY, str(TOOLS / "benchmarks"), str(TOOLS)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_known_sequence_has_the_launches_bytes_flops_and_waits_that_it_has(tools: Any) -> None:
    """Views launch nothing; a matrix product reads both and writes one; an index reads what it takes."""
    counting = tools("counting")
    x, w = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((4, 8), (16, 8)))
    host, rows = torch.zeros(3), torch.empty(2, dtype=torch.long, device="meta")
    with counting.Counting() as counted:
        y = x @ w.t()  # reads 64 + 256, writes 128
        y[:, :3].contiguous()  # 24 and 24
        y.add_(1)  # 128 and 128
        w.index_select(0, rows)  # 16, and 32 of 256 and 32
        x.view(-1).detach().unsqueeze(0).expand(3, -1)
        host.add(1)
        host.to("meta", non_blocking=True)  # 12 and 12
    c = counted.counts
    assert (c.launches, c.bytes, c.flops) == (5, 448 + 48 + 256 + 80 + 24, 2 * 4 * 8 * 16), c
    assert (c.uploads, c.syncs, c.collectives) == (1, 0, 0), c
    with counting.Counting() as counted, counting.collectives(run=False):
        host.to("meta")
        torch.tensor([1.0], device="meta")
        w[torch.arange(2)]
        torch.distributed.all_reduce(x)
        counting.kernel("fused", [x], [w], launches=3)
    c = counted.counts
    assert (c.uploads, c.syncs, c.collectives, c.collective_bytes) == (3, 3, 1, 64), c
    assert c.kernels["fused"] == 3
    with counting.Counting("cpu") as counted:
        assert host.sum() == 0
        host.nonzero()
        host[host > 0]
    assert counted.counts.syncs == 3


def test_elastic_steps_make_the_host_wait_no_more_than_stock_ones(
    tools: Any, steps: dict[str, dict[str, Any]]
) -> None:
    """On tensors without data: whatever read a number back would fail. Beyond stock's there is one small message."""
    for name, other in tools("paper_steps").AGAINST.items():
        ours, stock = steps[name], steps[other]
        assert ours["syncs"] == stock["syncs"] == 1, name  # the dispatcher's, of one layer of experts
        assert ours["collectives"] - stock["collectives"] == (name == "elastic, soft"), name
        assert 0 <= ours["collective_bytes"] - stock["collective_bytes"] < 1000, name
        # masks are no products; the router of 3 budgets is small
        assert ours["launches"] > stock["launches"] and ours["bytes"] >= stock["bytes"], name


def test_counts_add_up_over_layers(steps: dict[str, dict[str, Any]]) -> None:
    """Two layers more cost what each of them costs: so a table by kinds of layers is one of the whole model."""
    for field in ("launches", "bytes", "syncs", "collectives"):
        base, *more, both = (steps[p][field] for p in ("elastic, soft", "MM*E", "M*EE", "MM*EE"))
        assert both - base == pytest.approx(sum(m - base for m in more), rel=2e-2), field


def test_a_missed_goal_is_named(tools: Any) -> None:
    launches = tools("launches")
    results = json.loads(launches.RESULTS.read_text())
    for name, words in (("elastic, soft", "1.12"), ("sliced, full", "1.02")):
        worse = json.loads(json.dumps(results))
        whole = worse["steps"][name]["whole"]
        whole["seconds"] *= 2
        whole["syncs"] += 1
        whole["collectives"] += 2
        assert sum(name in line for line in launches.misses(worse)) == 3
        assert any(words in line for line in launches.misses(worse))
    with pytest.raises(UserError, match="these are no results"):
        launches.render({})
    block = launches.ratios.README.read_text()
    assert "\n".join(launches.render(results)) in block, "run tools/benchmarks/launches.py --table"
