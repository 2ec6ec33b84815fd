"""What the memory formulas count is what torch holds: in the loss, and for the masks of an elastic model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from elastic_megatron.blocks import build_elastic_model, build_model, running
from elastic_megatron.checkpoint.amax import Amax
from elastic_megatron.checkpoint.quantised_plan import planned_by
from elastic_megatron.cost import rank_memory
from elastic_megatron.cost.rank_memory import Load
from elastic_megatron.cost.setting import sizes_of
from elastic_megatron.ops import Projection, SubmodelMix, chunked_distillation_loss
from elastic_megatron.recipe.deploy import Quantize
from elastic_megatron.recipe.training import Parallel
from elastic_megatron.space import ElasticSpace, ParentShape
from elastic_megatron.training.quantizers import QuantisedLinears

TOKENS = 256
SHAPE = ParentShape(
    "M", hidden_size=256, vocab_size=64, ffn_hidden_size=1024, num_moe_experts=8, moe_router_topk=2,
    moe_ffn_hidden_size=192, moe_shared_expert_intermediate_size=384, mamba_num_heads=16, mamba_head_dim=32,
    mamba_state_dim=32, mamba_num_groups=4, num_attention_heads=8, num_query_groups=2, kv_channels=32,
)  # fmt: skip
CHOICES = {
    "M": {"mamba_num_heads": [8, 16]},
    "*": {"num_attention_heads": [4, 8]},
    "-": {"ffn_hidden_size": [512, 1024]},
    "E": {
        "moe_ffn_hidden_size": [96, 192],
        "num_moe_experts": [4, 8],
        "moe_shared_expert_intermediate_size": [192, 384],
    },
}


def held(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes that a call holds beyond what was there: the most at a time, and when it is done, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    results: Any = profiled.profiler
    now = most = 0
    for event in sorted(results.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del result
    return most, now


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "cross_entropy"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("tokens", "chunk"), [(48, None), (192, None), (192, 96)])
def test_the_loss_holds_what_the_formula_says(
    dtype: str, kind: str, temperature: float, recompute: bool, tokens: int, chunk: int | None
) -> None:
    """Fewer tokens than a chunk, several chunks, and chunks of another size; hidden states are there before."""
    vocabulary, channels, numbers = 4096, (32, 48), {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    student, teacher = (
        Projection(torch.randn(tokens, h).to(numbers), torch.randn(vocabulary, h).to(numbers))
        for h in channels
    )
    learned = student.hidden.requires_grad_(), student.weight.requires_grad_()
    labels, mask = torch.zeros(tokens, dtype=torch.long), torch.ones(tokens)
    taught = kind != "cross_entropy"

    def run() -> None:
        for tensor in learned:
            tensor.grad = None
        loss, _ = chunked_distillation_loss(
            student,
            teacher if taught else None,
            labels,
            mask,
            kind=kind,
            temperature=temperature,
            ce_weight=0.3,
            chunk=chunk,
            recompute=recompute,
        )
        loss.backward()

    run()
    for tensor in learned:
        tensor.grad = None
    shape = ParentShape("-", hidden_size=channels[0], vocab_size=vocabulary, ffn_hidden_size=8)
    load = Load(
        tokens, 1, dtype, teacher=replace(shape, hidden_size=channels[1]) if taught else None, chunk=chunk
    )
    counted = rank_memory._logits(shape, sizes_of(Parallel()), load)
    states = tokens * (sum(channels) if taught else channels[0]) * load.size
    # on a CPU every thread may make products of bf16 from a copy of the weight in another order
    copies = 0 if dtype == "fp32" else vocabulary * max(channels) * load.size * torch.get_num_threads()
    assert 0.99 * (counted - states) <= held(run)[0] <= 1.01 * (counted - states) + copies


def kept(model: Any, mix: SubmodelMix | None) -> int:
    """Bytes that one forward pass keeps for its backward pass, and its logits."""
    tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    positions = torch.arange(TOKENS).expand(1, -1)

    def run() -> object:
        with running(model, mix) if mix is not None else nullcontext():
            return model(tokens, positions, None)

    return held(run)[1]


def rounded(model: Any, shape: ParentShape) -> Any:
    """The model on quantised linears."""
    quantised = planned_by(Quantize(format="fp8"), shape)
    linears = QuantisedLinears([model], shape, quantised, "MAMBA_MOE_FP8_AGGRESSIVE_CFG")
    one = Amax(torch.tensor(1.0), torch.tensor(1.0))
    linears.freeze({linear.shard.name: one for linear in linears.linears})
    return model


def layer_keeps(symbol: str, elastic: bool, *, quantised: bool = False) -> int:
    """Of one layer: what two keep, less what one keeps."""
    found = []
    for layers in (1, 2):
        shape = ParentShape.from_dict(SHAPE.to_dict() | {"hybrid_layer_pattern": symbol * layers})
        mix = None
        if elastic:
            space = ElasticSpace.build(shape, {"hidden_size": [128, 256], **CHOICES[symbol]})
            probs = {
                a: torch.full((len(space.choices_of(a)),), 1 / len(space.choices_of(a))).requires_grad_()
                for a in space.axes
            }
            mix = SubmodelMix(space, probs)
            model = build_elastic_model(space, dtype=torch.bfloat16).train()
        else:
            model = build_model(shape, dtype=torch.bfloat16).train()
            model = rounded(model, shape) if quantised else model
        found.append(kept(model, mix))
    return found[1] - found[0]


@pytest.mark.parametrize("symbol", list("M*-E"))
def test_learning_masks_keep_what_was_written_before_them(megatron: Any, symbol: str) -> None:
    """The masks themselves, a vector or two of the widest, are not counted."""
    parallel = sizes_of(Parallel())
    with_masks, without = (
        rank_memory._layer_bytes(SHAPE, parallel, symbol, Load(TOKENS, 1, elastic=elastic))
        for elastic in (True, False)
    )
    measured = layer_keeps(symbol, True) - layer_keeps(symbol, False)
    assert measured == pytest.approx(with_masks - without, abs=2 * 4 * SHAPE.ffn_hidden_size)


@pytest.mark.parametrize("symbol", list("M-E"))
def test_rounded_weights_are_kept_beside_the_weights(megatron: Any, symbol: str) -> None:
    """And, by a layer of experts, what several of them read."""
    shape, parallel = SHAPE.override(hybrid_layer_pattern=symbol), sizes_of(Parallel())
    stored = planned_by(Quantize(format="fp8"), shape).stored_keys(shape)
    load = Load(TOKENS, 1, rounded=frozenset((layer, layout.name) for layer, layout, _ in stored))
    plain, with_copies = (
        rank_memory._layer_bytes(shape, parallel, symbol, each)
        for each in (replace(load, rounded=frozenset()), load)
    )
    largest = {"M": 1296 * 256, "-": 1024 * 256, "E": 384 * 256}[symbol]
    copies = rank_memory._rounded(shape, parallel, 0, load) - 4 * largest
    measured = layer_keeps(symbol, False, quantised=True) - layer_keeps(symbol, False)
    assert measured == pytest.approx(copies + with_copies - plain, rel=0.01)


def test_layers_keep_at_least_what_is_counted(megatron: Any) -> None:
    """Without fused kernels norms are kept in fp32 besides."""
    for symbol in "M*-E":
        counted = rank_memory._layer_bytes(SHAPE, sizes_of(Parallel()), symbol, Load(TOKENS, 1))
        assert layer_keeps(symbol, False) >= 0.95 * counted
