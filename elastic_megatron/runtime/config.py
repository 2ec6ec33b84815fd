"""``TransformerConfig`` fields that depend on the machine and not on the model."""

from importlib.util import find_spec
from typing import Any

import torch


def transformer_config_defaults() -> dict[str, Any]:
    """Fields of ``TransformerConfig`` that this machine wants; merge them under the model's own.

    On a GPU: initialisation there, grouped expert GEMMs where Transformer Engine is installed, and
    gradient accumulation inside the weight GEMM where Apex's extension for it is.  The masked-softmax
    and persistent-norm kernels belong to layers that no spec of ours uses, and squared ReLU has no
    fused bias activation.  ``deallocate_pipeline_outputs`` frees a stage's output once it is sent.
    """
    cuda = torch.cuda.is_available()
    return {
        "use_cpu_initialization": not cuda,
        "gradient_accumulation_fusion": cuda and find_spec("fused_weight_gradient_mlp_cuda") is not None,
        "bias_dropout_fusion": cuda,
        "moe_grouped_gemm": cuda and _has_transformer_engine(),
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
        "deallocate_pipeline_outputs": True,
    }


def _has_transformer_engine() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)
