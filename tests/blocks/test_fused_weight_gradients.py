"""Apex's fused weight gradients, under masks and Megatron's DDP: a stand-in of its extension in plain torch.

The extension adds a linear's weight gradient to ``main_grad`` itself and tells DDP by a flag on the parameter.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from laws import build_elastic, one_hot, run, scalar, soft_mix, spec_of, subspace, tokens, worst
from torch import Tensor

from elastic_megatron.blocks import SlicedModel
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.training.overlap import Overlap

SPACE = subspace()
NARROW = spec_of(SPACE, hidden_size=16, moe_ffn_hidden_size=[3, 11], mamba_num_heads=4)
MODES = ("learning masks", "fixed masks", "no masks", "sliced")


def accumulate(x: Tensor, gradient: Tensor, main_grad: Tensor) -> None:
    main_grad.add_(gradient.flatten(0, -2).float().t() @ x.flatten(0, -2).float())


def mix_of(mode: str) -> SubmodelMix | None:
    if mode == "no masks":
        return None
    if mode == "learning masks":
        probs = soft_mix(SPACE, 3).probs
        return SubmodelMix(SPACE, {a: p.detach().float().requires_grad_() for a, p in probs.items()})
    return one_hot(SPACE, NARROW, torch.float32)


def main_gradients(mode: str, *, fusion: bool, overlap: bool, recompute: bool = False) -> dict[str, Tensor]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    granularity = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    model = build_elastic(
        SPACE, torch.float32, gradient_accumulation_fusion=fusion, **(granularity if recompute else {})
    )
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    ddp = DistributedDataParallel(model.config, config, model)
    reported = Overlap(ddp)
    sliced = SlicedModel(model, landed=reported.landed)
    ddp.zero_grad_buffer()
    for i in range(2):
        with ddp.no_sync() if i == 0 else contextlib.nullcontext():
            inputs, mix = tokens(SPACE, 2, 11, i), mix_of(mode)
            if mode == "sliced":
                assert mix is not None
                out = sliced.forward(mix, *inputs, None)
            else:
                out = run(model, mix, inputs)
            scalar(out, i).backward()
            if i == 1 and mode == "sliced":
                reported.rest()
    ddp.finish_grad_sync()
    return {n: p.main_grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
def test_fused_weight_gradients_are_the_unfused_ones(
    megatron: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """To fp32 rounding, with and without overlapped reduction and recomputation, over two micro-batches."""
    from megatron.core.tensor_parallel import layers

    extension = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", extension, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    plain = main_gradients(mode, fusion=False, overlap=False)
    assert all(bool(g.isfinite().all()) for g in plain.values()) and any(
        bool(g.any()) for g in plain.values()
    )
    for overlap in (False, True):
        for recompute in (False, True):
            found = main_gradients(mode, fusion=True, overlap=overlap, recompute=recompute)
            error, where = worst(found, plain, 1e-4)
            assert error < 2e-5, (overlap, recompute, where)
