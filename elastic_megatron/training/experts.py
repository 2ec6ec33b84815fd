"""How expert layers run: settings of Megatron's config that a recipe chooses."""

from __future__ import annotations

from typing import Any

from .. import runtime
from ..checkpoint.source import Source
from ..recipe import Recipe


def expert_execution(recipe: Recipe) -> dict[str, Any]:
    """How tokens reach experts and what is fused around their GEMMs; the same numbers, of teacher and student."""
    parallel = recipe.parallel
    return {
        "moe_token_dispatcher_type": parallel.dispatcher,
        "moe_shared_expert_overlap": parallel.shared_expert_overlap,
        **(runtime.fused_experts() if parallel.fused_experts else {}),
    }


def moe_overrides(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Settings of a student that has experts: how they run and how their load is balanced."""
    if not source.manifest.shape.num_moe_experts:
        return {}
    aux = recipe.loss.moe_aux_loss
    return {
        **expert_execution(recipe),
        "moe_router_load_balancing_type": "seq_aux_loss" if aux else "none",
        "moe_aux_loss_coeff": aux,
        "moe_router_bias_update_rate": recipe.loss.moe_bias_update_rate,
    }
