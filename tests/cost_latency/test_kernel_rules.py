"""Sizes that kernels refuse: exactly those, and what is said to do mends it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_shapes import DENSE, NANO

from elastic_megatron.cost.kernel_rules import kernel_rules, served_experts, slow_attention
from elastic_megatron.cost.layout_rules import widths_of
from elastic_megatron.cost.remedy import described, problems_of, remedies
from elastic_megatron.cost.setting import Setting
from elastic_megatron.errors import UserError
from elastic_megatron.recipe import Recipe
from elastic_megatron.recipe.training import Parallel
from elastic_megatron.space import ElasticSpace, ParentShape

MAMBA = ParentShape(
    "MM", hidden_size=64, vocab_size=64, mamba_num_heads=16, mamba_head_dim=12, mamba_state_dim=12, mamba_num_groups=4
)  # fmt: skip


def on_gpus(shape: ParentShape, space: ElasticSpace | None = None, **layout: Any) -> Setting:
    return Setting.of(shape, space, Parallel(**layout), gpus=True)


def refused_by_the_kernel(setting: Setting) -> bool:
    """The slow truth: deal out every head and group, and count what lies on the fullest rank."""
    tensor, context, groups = (
        setting.parallel.tensor,
        setting.parallel.context,
        setting.shape.mamba_num_groups,
    )
    axes = ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim")
    for heads, dim, state in product(*(widths_of(setting, a) for a in axes)):
        x = [h * dim + c for h in range(heads) for c in range(dim)]
        mine = x[: len(x) // tensor][: len(x) // tensor // context]
        local = list(range(groups // tensor))
        held = local[: len(local) // context] if len(local) >= context else local[:1]
        if (len(mine) + 2 * len(held) * state) % 8:
            return True
    return False


@settings(deadline=None)
@given(
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.sets(st.sampled_from([4, 8, 12, 16])),
    st.sets(st.integers(1, 12), max_size=3), st.sets(st.integers(1, 12), max_size=3),
)  # fmt: skip
def test_refused_are_exactly_the_channels_that_the_convolution_refuses(
    tensor: int, context: int, heads: set[int], dims: set[int], states: set[int]
) -> None:
    """Channels of a rank, x and its share of B and C, are a multiple of 8 in every submodel."""
    choices = {"mamba_num_heads": heads, "mamba_head_dim": dims, "mamba_state_dim": states}
    space = ElasticSpace.build(MAMBA, {a: sorted(c) for a, c in choices.items() if c})
    setting = on_gpus(MAMBA, space, tensor=tensor, context=context)
    if any(n % (tensor * context) for n in widths_of(setting, "mamba_num_heads")):
        return
    assert bool(list(kernel_rules(setting))) == refused_by_the_kernel(setting)
    assert not list(kernel_rules(replace(setting, gpus=False)))


@settings(deadline=None, max_examples=30)
@given(st.sets(st.integers(1, 12), min_size=1, max_size=3), st.sampled_from([1, 2]))
def test_what_a_refused_convolution_is_told_to_do_mends_it(dims: set[int], tensor: int) -> None:
    space = ElasticSpace.build(replace(MAMBA, mamba_head_dim=16), {"mamba_head_dim": sorted(dims)})
    setting = on_gpus(space.parent, space, tensor=tensor)
    for problem in kernel_rules(setting):
        ways = remedies(setting, problem)
        assert ways, problem
        for way in ways:
            changed = setting.changed(way)
            assert changed is not None and not problems_of(changed)


def test_the_nearest_legal_widths_are_named() -> None:
    space = ElasticSpace.build(NANO, {"mamba_head_dim": [50, 64]}, granule={})
    assert not list(
        kernel_rules(on_gpus(NANO, space, tensor=4, context=2))
    )  # 8 heads make any width a multiple
    narrow = on_gpus(NANO, space, tensor=8, context=8, sequence=True)
    (problem,) = kernel_rules(narrow)
    assert "mamba_head_dim=50" in problem.text and "mamba_head_dim 48 or 56 would do" in problem.text
    assert "set space.choices.mamba_head_dim=[48,64]" in described(narrow, problem)


def test_frozen_widths_are_refused_with_what_to_train_instead() -> None:
    space = ElasticSpace.build(replace(MAMBA, mamba_head_dim=16), {"mamba_head_dim": [9]})
    frozen = replace(on_gpus(space.parent, space, tensor=4), frozen=True)
    (problem,) = kernel_rules(frozen)
    assert "space.choices" in problem.otherwise and not any(
        k.startswith("space") for c in problem.changes for k in c
    )


@pytest.mark.parametrize("taps", [1, 5])
def test_the_convolution_has_two_to_four_taps(taps: int) -> None:
    (problem,) = kernel_rules(on_gpus(replace(DENSE, conv_kernel=taps)))
    assert f"conv_kernel={taps}" in problem.text


@pytest.mark.parametrize("size", [20, 264])
def test_odd_heads_are_slow_and_refused_under_context_parallelism(size: int) -> None:
    shape = replace(DENSE, kv_channels=size)
    alone, shared = on_gpus(shape), on_gpus(shape, context=2)
    assert not list(kernel_rules(alone)) and len(list(slow_attention(alone))) == 1
    (problem,) = kernel_rules(shared)
    assert remedies(shared, problem) == [{"parallel.context": 1}] and not list(slow_attention(shared))
    for legal in (24, 256):
        fine = replace(shape, kv_channels=legal)
        assert not list(slow_attention(on_gpus(fine))) and not list(kernel_rules(on_gpus(fine, context=2)))


def test_deep_ep_takes_tokens_by_sixteen_bytes() -> None:
    space = ElasticSpace.build(NANO, {"hidden_size": [2052, 2688]})
    flex = on_gpus(NANO, space, expert=8, dispatcher="flex")
    (problem,) = kernel_rules(flex)
    assert {"space.choices.hidden_size": [2056, 2688]} in remedies(flex, problem)
    assert not list(kernel_rules(on_gpus(NANO, space, expert=8)))


@given(st.integers(1, 60), st.sampled_from([1, 2, 4, 8]))
def test_expert_widths_that_engines_refuse_are_told_with_the_nearest_that_they_take(
    n: int, tensor: int
) -> None:
    """``width / tensor`` is whole blocks of 16 on every rank."""
    full = 8 * n
    shape = replace(NANO, moe_ffn_hidden_size=full)
    lines = list(served_experts(on_gpus(shape), tensor))
    assert bool(lines) == (full / tensor % 16 != 0)
    for line in lines:
        found = [int(w) for w in line.rpartition("; ")[2].removesuffix(" can").split(" or ")]
        others = [w for w in range(1, 4 * 16 * tensor + full) if w / tensor % 16 == 0]
        nearest = min(abs(w - full) for w in others)
        assert all(w in others for w in found) and nearest in [abs(w - full) for w in found]


def test_nano_cannot_be_served_on_eight_ranks() -> None:
    (line,) = served_experts(on_gpus(NANO), 8)
    assert "moe_ffn_hidden_size=1856" in line and "232 each" in line and "1792 or 1920" in line
    assert not list(served_experts(on_gpus(NANO), 4))


@pytest.mark.parametrize("gpus", [True, False])
def test_commands_refuse_before_they_build_where_there_is_a_gpu(
    gpus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastic_megatron import runtime
    from elastic_megatron.training.start import start

    monkeypatch.setattr(runtime, "on_gpus", lambda: gpus)
    monkeypatch.setattr(runtime, "start", lambda **_: "started")
    shape = replace(DENSE, conv_kernel=5)
    recipe = Recipe.model_validate({"name": "r", "run_dir": "r", "model": {"sizes": shape.to_dict()}})
    if not gpus:
        assert start(recipe, shape, None) == "started"
        return
    with pytest.raises(UserError, match="conv_kernel=5"):
        start(recipe, shape, None)
