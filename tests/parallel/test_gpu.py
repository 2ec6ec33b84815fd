"""The important comparisons again, with NCCL, Transformer Engine, grouped GEMM and mamba-ssm's kernels.

No GPU has run them yet (docs/parallelism.md), so their tolerances are guesses.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_jobs
import pytest
import torch
import training_jobs
from layouts import LAYOUTS, Layout
from pool import RankPool
from runs import STEPS, per_draw

from elastic_megatron.cost.kernel_rules import kernel_rules, slow_attention
from elastic_megatron.cost.setting import Setting
from elastic_megatron.recipe.training import Parallel
from elastic_megatron.space import ElasticSpace

NEEDS_TE = pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs transformer-engine")
NEEDS_SSM = pytest.mark.skipif(find_spec("mamba_ssm") is None, reason="needs mamba-ssm")
MIRRORED = [
    pytest.param(layout, marks=pytest.mark.gpu(layout.world), id=layout.name)
    for layout in LAYOUTS
    if layout.name
    in ("TP2+SP", "EP2", "PP2", "PP2+VPP2", "CP2", "DP2+overlap", "TP2+SP+ETP1+EP2", "TP2+SP+ETP1+EP2+PP2")
]


@pytest.mark.parametrize("layout", [param.values[0] for param in MIRRORED], ids=lambda layout: layout.name)
def test_kernels_take_the_sizes_of_these_tests(layout: Layout) -> None:
    """On the ranks of each layout, and no others would do: the ones of the CPU's tests are refused."""
    for gpus in (True, False):
        shape = training_jobs.parent_of(layout.moe, gpus)
        section = training_jobs.space_section(layout.moe, gpus)
        space = ElasticSpace.build(
            shape, section["choices"], section["lanes"], per_layer=section["per_layer"]
        )
        setting = Setting.of(shape, space, Parallel(**layout.parallel), gpus=True)
        assert bool([*kernel_rules(setting), *slow_attention(setting)]) is not gpus


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@NEEDS_SSM
@pytest.mark.parametrize("layout", MIRRORED)
def test_ten_steps_over_nccl_are_those_of_one_gpu(
    layout: Layout, write: Callable[..., Path], gpu_ranks: RankPool
) -> None:
    def run(name: str, world: int, parallel: dict[str, Any]) -> dict[str, Any]:
        file = write(name, layout.moe, per_draw(layout), parallel, gpus=True)
        return gpu_ranks.run(training_jobs.trained, world, str(file), timeout=600)[0]

    expected = run(f"gpu_alone_{layout.name}", 1, {})
    found = run(f"gpu_{layout.name}", layout.world, dict(layout.parallel))
    mine, theirs = ([x["loss"] for x in r["lines"] if "loss" in x] for r in (found, expected))
    assert len(mine) == STEPS and mine == pytest.approx(theirs, rel=1e-3)


@pytest.mark.gpu
@NEEDS_TE
@NEEDS_SSM
@pytest.mark.parametrize("grouped", [False, True], ids=["one GEMM an expert", "grouped GEMM"])
def test_transformer_engine_computes_what_the_local_spec_does(
    write: Callable[..., Path], corpus: Path, gpu_ranks: RankPool, grouped: bool
) -> None:
    write("gpu_specs", True, 1, {}, gpus=True)
    parent = str(corpus / "parent_moe_gpus")
    (local,) = gpu_ranks.run(gpu_jobs.submodel_logits, 1, parent, "local", moe_grouped_gemm=False)
    (engine,) = gpu_ranks.run(gpu_jobs.submodel_logits, 1, parent, "te", moe_grouped_gemm=grouped)
    assert relative(engine, local) < 5e-2


@pytest.mark.gpu
@NEEDS_SSM
def test_the_torch_scan_is_the_kernel(gpu_ranks: RankPool) -> None:
    (ours, theirs), *_ = gpu_ranks.run(gpu_jobs.scans, 1)
    assert relative(ours, theirs) < 1e-2
