"""What a GPU rank does in the tests that need one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from training_jobs import parent_of, space_section

from elastic_megatron import runtime
from elastic_megatron.blocks import build_elastic_model, running
from elastic_megatron.checkpoint import distributed
from elastic_megatron.checkpoint.tracker import resolve
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.space import ElasticSpace


def submodel_logits(parent: str, impl: str, **overrides: Any) -> Tensor:
    """[2, 16, vocabulary] on the CPU: logits of the smallest submodel in bf16, with one layer spec."""
    device = runtime.start(seed=1).device
    section, shape = space_section(True, gpus=True), parent_of(True, gpus=True)
    space = ElasticSpace.build(shape, section["choices"], section["lanes"], per_layer=section["per_layer"])
    spec = runtime.hybrid_stack_spec(impl)  # type: ignore[arg-type]
    model = build_elastic_model(space, dtype=torch.bfloat16, spec=spec, **overrides).to(device).eval()
    distributed.load(resolve(Path(parent)), [model])
    ids = torch.randint(0, shape.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    mix = SubmodelMix.one_hot(space, space.smallest(), device)
    with torch.no_grad(), running(model, mix):
        return model(ids, torch.arange(16, device=device).expand(2, -1), None).float().cpu()


def scans() -> tuple[Tensor, Tensor]:
    """The chunked scan in torch and mamba-ssm's kernel, on the same inputs."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    from elastic_megatron.runtime import ssd

    device = runtime.start(seed=1).device
    torch.manual_seed(0)
    batch, length, heads, dim, groups, states = 2, 200, 8, 32, 2, 16
    x = torch.randn(batch, length, heads, dim, device=device)
    dt = torch.rand(batch, length, heads, device=device)
    a = -torch.rand(heads, device=device) - 0.5
    b, c = (torch.randn(batch, length, groups, states, device=device) for _ in range(2))
    theirs = mamba_chunk_scan_combined(x, dt, a, b, c, chunk_size=64)
    return ssd.mamba_chunk_scan_combined(x, dt, a, b, c, chunk_size=64).cpu(), theirs.cpu()
