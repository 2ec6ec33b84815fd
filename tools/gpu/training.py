"""Step ``training``: the training loop itself, five steps, with and without gradients that a GEMM adds up."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from elastic_megatron import runtime
from elastic_megatron.training.train import train
from gpu.bench import Bench
from gpu.models import config, losses, parent, recipe

STEPS = 5
EXTENSION = "fused_weight_gradient_mlp_cuda"


def training(bench: Bench) -> None:
    """DDP with the distributed optimizer, overlapped communication, full recomputation and a learning router.

    The losses with fused weight gradients are those without: to rounding, which the budgets' choices amplify.
    """
    parent(bench)
    found: dict[bool, list[dict[str, Any]]] = {}
    with _extension(bench) as there:
        for fusion in (False, True) if there else (False,):
            found[fusion] = _five_steps(bench, fusion)
            name = f"gradient fusion {'on' if fusion else 'off'}"
            finite = [x["loss"] for x in found[fusion] if math.isfinite(x["loss"]) and x["updated"]]
            bench.at_most(f"{name}, steps without an update or a finite loss", STEPS - len(finite), 0)
            bench.number(f"{name}, last step", found[fusion][-1]["step_ms"], "ms")
            if runtime.start(seed=1).device.type != "cpu":
                bench.number(f"{name}, peak memory", torch.accelerator.max_memory_allocated() / 2**30, "GiB")
    if not there:
        bench.says("gradient fusion on", f"not run: {EXTENSION} (Apex) does not import")
        return
    limit = 1e-4 if bench.rehearse else 5e-2
    for key in ("loss", "kd_loss", "grad_norm"):
        off = max(
            abs(a[key] - b[key]) / abs(b[key])
            for a, b in zip(found[True], found[False], strict=True)
            if b[key]
        )
        bench.at_most(f"fusion on against off, {key} of {STEPS} steps", off, limit)


def _five_steps(bench: Bench, fusion: bool) -> list[dict[str, Any]]:
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    run = recipe(
        bench, f"fusion_{'on' if fusion else 'off'}", steps=STEPS,
        parallel={"overlap": True, "recompute": "full"}, loss={"moe_aux_loss": 0.01, "ce_weight": 1.0},
    )  # fmt: skip
    with config(gradient_accumulation_fusion=fusion):
        train(run)
    return losses(run)


@contextmanager
def _extension(bench: Bench) -> Iterator[bool]:
    """Is Apex's extension there? In a rehearsal, torch's sum is."""
    if not bench.rehearse:
        yield find_spec(EXTENSION) is not None
        return
    from megatron.core.tensor_parallel import layers

    calls = 0

    def accumulate(x: Tensor, gradient: Tensor, main_grad: Tensor) -> None:
        nonlocal calls
        calls += 1
        main_grad.add_(gradient.flatten(0, -2).float().t() @ x.flatten(0, -2).float())

    bench.stands_in("torch's sum in place of Apex's fused gradients, gloo in place of NCCL")
    extension = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    with (
        mock.patch.object(layers, EXTENSION, extension, create=True),
        mock.patch.object(layers, "_grad_accum_fusion_available", True),
    ):
        yield True
    assert calls, "no linear handed its weight gradient to the extension"
