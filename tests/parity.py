"""Megatron's logits beside those of transformers on what was exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from elastic_megatron.space import ParentShape

PARENT = ParentShape(
    "MEM*E-M", 64, 264, ffn_hidden_size=96, moe_ffn_hidden_size=48, moe_shared_expert_intermediate_size=64,
    num_moe_experts=16, moe_router_topk=3, moe_router_topk_scaling_factor=2.5, mamba_num_heads=8,
    mamba_head_dim=8, mamba_state_dim=16, mamba_num_groups=2, num_attention_heads=8, num_query_groups=2,
    kv_channels=16, mamba_chunk_size=16,
)  # fmt: skip
# Rounding alone reaches 7e-7 here; transformers' norms, router and scan are fp32 whatever the model's dtype
TOLERANCE = 2e-6


def randomise(model: torch.nn.Module) -> None:
    """Scaled-up weights, uneven norms, D and expert biases, all exact in fp32."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            if p.dim() >= 2:
                p.mul_(4)
            if "norm" in name or name.endswith(".D"):
                p.add_(0.3 * noise)
            p.copy_(p.float())
        for name, b in model.named_buffers():
            if name.endswith("expert_bias"):
                b.copy_((0.3 * torch.randn(b.shape, generator=generator)).float())


def megatron_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] of a Megatron model."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        return model(tokens, positions, None)


def load(directory: Path, **kwargs: Any) -> Any:
    """The model as a user loads it, with nothing set by hand, and what the loader complained about."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **kwargs)
    model, info = loaded
    return model.eval(), {k: v for k, v in info.items() if v}


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()
