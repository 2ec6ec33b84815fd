"""The student with its router and optimizer, and the frozen teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..blocks import build_elastic_model, build_model
from ..checkpoint.resolve import budgets
from ..checkpoint.source import Source, open_source
from ..errors import UserError
from ..recipe import Recipe
from ..router import BudgetRouter
from ..router.loss import relative_target
from ..space import ElasticSpace
from .family import DTYPES


@dataclass(frozen=True)
class Model:
    """The student and what trains it: the bare ``HybridModel``, its DDP wrapper and a Megatron optimizer."""

    bare: nn.Module
    ddp: nn.Module
    optimizer: Any
    space: ElasticSpace | None
    router: BudgetRouter | None


def build_student(recipe: Recipe, source: Source, space: ElasticSpace | None) -> Model:
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    dtype, distributed = DTYPES[recipe.model.dtype], recipe.parallel.distributed_optimizer
    if dtype is torch.bfloat16 and not distributed:
        raise UserError(
            "parallel.distributed_optimizer is false, but without it Megatron cannot save the fp32 parameters of a "
            "bf16 model (A_log, D, the router); set it to true, or model.dtype to fp32"
        )
    overrides = moe_overrides(recipe, source)
    if recipe.parallel.recompute == "full":
        overrides |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if space is not None:
        bare = build_elastic_model(space, dtype=dtype, **overrides)
    else:
        bare = build_model(source.manifest.shape, dtype=dtype, **overrides)
    source.fill(bare)
    router = None
    if space is not None:
        named = budgets(recipe)
        router = BudgetRouter(
            space,
            named,
            [relative_target(space, b) for b in named],
            inner_size=recipe.router.inner_size,
            init_std=recipe.router.init_std,
            pin_full=recipe.router.pin_full,
            seed=recipe.seed,
        ).to(next(bare.parameters()).device)
        bare.budget_router = router
    bare.train()
    config = bare.config
    config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallel(
        config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed),
        bare,
    )
    return Model(bare, ddp, _optimizer(recipe, ddp, dtype), space, router)


def _optimizer(recipe: Recipe, ddp: nn.Module, dtype: torch.dtype) -> Any:
    """Megatron's Adam: the router at its own rate, and no parameter group of two types."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey

    o = recipe.optimizer
    settings = OptimizerConfig(
        optimizer="adam", lr=o.lr, min_lr=o.min_lr, weight_decay=o.weight_decay, adam_beta1=o.betas[0],
        adam_beta2=o.betas[1], adam_eps=o.eps, clip_grad=o.clip_grad, bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
    )  # fmt: skip
    r = recipe.router
    groups = {
        ParamKey(name="*budget_router.*"): {"max_lr": r.lr, "min_lr": o.min_lr * r.lr / o.lr, "wd_mult": 0.0},
        # fp32 in a bf16 model too, and Megatron cannot save a parameter group of two types; mamba-ssm
        # exempts both from weight decay
        ParamKey(name=("*.mixer.A_log", "*.mixer.D")): {"wd_mult": 0.0},
    }
    return get_megatron_optimizer(settings, [ddp], config_overrides=groups)


def moe_overrides(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Load-balancing settings of the recipe, for models that have experts."""
    if not source.manifest.shape.num_moe_experts:
        return {}
    aux = recipe.loss.moe_aux_loss
    return {
        "moe_router_load_balancing_type": "seq_aux_loss" if aux else "none",
        "moe_aux_loss_coeff": aux,
        "moe_router_bias_update_rate": recipe.loss.moe_bias_update_rate,
    }


def build_teacher(recipe: Recipe, source: Source) -> nn.Module | None:
    """The frozen parent (or another checkpoint), in evaluation mode; ``None`` for plain cross-entropy."""
    if recipe.loss.kind == "cross_entropy":
        return None
    if recipe.teacher.checkpoint is None and recipe.model.sizes is not None:
        raise UserError(
            f"loss.kind {recipe.loss.kind} distils the parent, but model.sizes starts from random weights; train "
            "a parent first and name it in model.checkpoint, or name a teacher.checkpoint"
        )
    chosen = source if recipe.teacher.checkpoint is None else open_source(recipe.teacher.checkpoint)
    if chosen.manifest.shape.vocab_size != source.manifest.shape.vocab_size:
        raise UserError(
            f"teacher.checkpoint has vocabulary {chosen.manifest.shape.vocab_size}, the parent "
            f"{source.manifest.shape.vocab_size}; distillation needs one tokenizer"
        )
    teacher = build_model(chosen.manifest.shape, dtype=DTYPES[recipe.model.dtype])
    chosen.fill(teacher)
    return teacher.requires_grad_(False).eval()
