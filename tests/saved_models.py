"""A small student with router and optimizer, to be saved and loaded under any layout, without training it."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from laws import subspace
from megatron.core import dist_checkpointing
from torch import Tensor, nn

from elastic_megatron import runtime
from elastic_megatron.blocks import build_chunks, build_elastic_model
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.router import BudgetRouter
from elastic_megatron.space import Budget

# Megatron collects garbage whenever it lists an optimizer's state: 0.3 s over all that the imports have made
gc.freeze()

# whole numbers of everything for two tensor x two context ranks and four expert ranks
EVEN = {
    "vocab_size": 54,
    "ffn_hidden_size": 28,
    "moe_ffn_hidden_size": 22,
    "moe_shared_expert_intermediate_size": 26,
    "mamba_num_heads": 12,
}
BUDGETS = (Budget("full", "active_params", 1.0), Budget("small", "active_params", 0.6))


@dataclass(frozen=True)
class Student:
    """This rank's part of a student: bare chunks, and the optimizer over their DDP wrappers."""

    chunks: list[nn.Module]
    optimizer: Any
    manifest: Manifest


def student(
    pattern: str = "MEM*E-",
    *,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
    distributed: bool = True,
    steps: int = 2,
    **layout: Any,
) -> Student:
    """Build one under a layout (sizes as ``runtime.start`` takes them) and move it ``steps`` steps."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey

    runtime.start(seed=seed, **layout)
    space = subspace(pattern, per_layer=False, **EVEN)
    chunks = build_chunks(lambda vp_stage: build_elastic_model(space, dtype=dtype, vp_stage=vp_stage))
    router = BudgetRouter(space, BUDGETS, [1.0, 0.6], inner_size=9, seed=seed)
    for parameter in router.parameters():
        parameter.shared = runtime.groups().pp.rank() > 0
    chunks[0].budget_router = router.to(next(chunks[0].parameters()).device)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    ddp = [
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=1e-2, bf16=dtype is torch.bfloat16, params_dtype=dtype,
                        use_distributed_optimizer=distributed, clip_grad=0.0),
        ddp,
        config_overrides={
            ParamKey(name="*budget_router.*"): {"wd_mult": 0.0, "max_lr": 3e-2},
            ParamKey(name=("*.mixer.A_log", "*.mixer.D")): {"wd_mult": 0.0},
        },
    )  # fmt: skip
    out = Student(chunks, optimizer, Manifest(shape=space.parent, space=space, budgets=BUDGETS))
    for _ in range(steps):
        move(out)
    return out


@torch.no_grad()
def move(student: Student) -> None:
    """One optimizer step along a gradient that is a function of each weight alone: the same for every layout."""
    for chunk in student.chunks:
        for parameter in chunk.parameters():
            parameter.main_grad.copy_(torch.sin(100 * parameter.float()) + 0.1)
    student.optimizer.step()


def whole(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, under its global name: weights, router and optimizer state."""
    content = dist_checkpointing.serialization.load_plain_tensors(str(folder))
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
