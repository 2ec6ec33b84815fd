"""``TransformerConfig`` fields that depend on the machine and not on the model."""

from typing import Any

import torch


def transformer_config_defaults() -> dict[str, Any]:
    """Fields of ``TransformerConfig`` that this machine wants; merge them under the model's own.

    ``deallocate_pipeline_outputs`` is set on both sides so that schedules call the autograd engine
    in the same way.  The fused kernels live in Apex and Transformer Engine, which need CUDA; on a
    GPU they are on where installed.
    """
    fused = torch.cuda.is_available()
    grouped = fused and _has_transformer_engine()
    return {
        "use_cpu_initialization": not fused,
        "gradient_accumulation_fusion": fused and _has_fused_weight_gradient(),
        "masked_softmax_fusion": fused,
        "bias_dropout_fusion": fused,
        "bias_activation_fusion": False,  # squared ReLU has no fused kernel
        "persist_layer_norm": grouped,
        "moe_grouped_gemm": grouped,
        "deallocate_pipeline_outputs": True,
    }


def _has_transformer_engine() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def _has_fused_weight_gradient() -> bool:
    """Whether Apex's ``fused_weight_gradient_mlp_cuda`` extension is installed."""
    from importlib.util import find_spec

    return find_spec("fused_weight_gradient_mlp_cuda") is not None
