"""The benchmark of the importance pass scores everything that it says, over the batches of the forward pass."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_megatron.errors import UserError
from elastic_megatron.space import AXIS_NAMES, ParentShape

TOOLS = Path(__file__).parents[2] / "tools"
TINY = ParentShape(
    "ME*-", hidden_size=32, vocab_size=64, ffn_hidden_size=32, moe_ffn_hidden_size=16,
    moe_shared_expert_intermediate_size=16, num_moe_experts=4, moe_router_topk=2, mamba_num_heads=4,
    mamba_head_dim=8, mamba_state_dim=8, mamba_num_groups=2, num_attention_heads=4, num_query_groups=2, kv_channels=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    before = list(sys.path)
    sys.path[:0] = [str(TOOLS / "benchmarks"), str(TOOLS)]
    yield importlib.import_module("ranking")
    sys.path[:] = before


@pytest.fixture
def tiny(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(benchmark, "setting", lambda _: (TINY, 2, 16))
    return benchmark


def test_the_models_have_every_axis_and_the_pass_with_the_target_scores_every_width(benchmark: Any) -> None:
    for parent in (benchmark.SMALL, benchmark.LARGE):
        assert all(parent.size(a) for a in AXIS_NAMES) and parent.hidden_size >= 512
    assert {t: set(benchmark.PASSES[t]) for t in benchmark.TARGETS} == {
        "REAP and the scores of all widths": {*AXIS_NAMES} - {"num_layers"}
    }


def test_a_pass_runs_what_the_forward_pass_runs_and_watches_it(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each contender runs every batch through every layer once; only the passes have hooks meanwhile."""
    device = tiny.interleave.start()
    parent, rows, length = tiny.setting(device)
    model, seen, hooks = tiny.build_model(parent), [], {}
    monkeypatch.setattr(tiny, "build_model", lambda *_, **__: model)

    def watch(*_: Any) -> None:
        seen.append(sum(len(module._forward_hooks) for module in model.modules()))

    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(watch)
    for name, contender in tiny.contenders(parent, rows, length, device).items():
        seen.clear()
        contender()
        assert len(seen) == tiny.BATCHES * parent.num_layers, name
        hooks[name] = seen[0]
    assert hooks[tiny.PLAIN] == 0 < hooks["REAP alone"] < hooks["REAP and the scores of all widths"]


def test_a_run_is_a_result_that_can_be_shown(tiny: Any) -> None:
    found = tiny.measure(argparse.Namespace(rounds=2))
    assert [(r["title"], r["target"]) for r in found["rows"]] == [
        ("REAP and the scores of all widths / forward", 1.10),
        ("REAP alone / forward", None),
    ]
    assert found["rounds"] == 2 and "`ME*-`" in "\n".join(tiny.ratios.render(found))
    with pytest.raises(UserError, match="0 rounds"):
        tiny.measure(argparse.Namespace(rounds=0))
