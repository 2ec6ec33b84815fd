"""``TransformerConfig`` fields that depend on the machine and not on the model."""

from importlib.util import find_spec
from typing import Any

import torch

from elastic_megatron.runtime.device import layout


def transformer_config_defaults() -> dict[str, Any]:
    """Fields of ``TransformerConfig`` that this machine wants; merge them under the model's own.

    On a GPU: initialisation there, grouped expert GEMMs where Transformer Engine is installed, and
    gradient accumulation inside the weight GEMM where Apex's extension for it is.  The masked-softmax
    and persistent-norm kernels belong to layers that no spec of ours uses, and squared ReLU has no
    fused bias activation.  ``deallocate_pipeline_outputs`` frees a stage's output once it is sent.

    The sizes of the running layout are among them.  A virtual pipeline overlaps its messages: batched ones are
    mismatched, without an error, where both neighbours of a stage are the same rank (two stages).
    """
    cuda, sizes = torch.cuda.is_available(), layout()
    interleaved = sizes.virtual_pipeline is not None
    return {
        "tensor_model_parallel_size": sizes.tensor,
        "sequence_parallel": sizes.sequence,
        "pipeline_model_parallel_size": sizes.pipeline,
        "virtual_pipeline_model_parallel_size": sizes.virtual_pipeline,
        "context_parallel_size": sizes.context,
        "expert_model_parallel_size": sizes.expert,
        "expert_tensor_parallel_size": sizes.expert_tensor,
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "use_cpu_initialization": not cuda,
        "gradient_accumulation_fusion": cuda and find_spec("fused_weight_gradient_mlp_cuda") is not None,
        "bias_dropout_fusion": cuda,
        "moe_grouped_gemm": cuda and has_transformer_engine(),
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
        "deallocate_pipeline_outputs": True,
    }


def fused_experts() -> dict[str, bool]:
    """Fields for fused kernels around expert GEMMs, where this machine has them."""
    cuda = torch.cuda.is_available()
    return {
        "use_fused_weighted_squared_relu": cuda,
        "moe_permute_fusion": cuda and has_transformer_engine(),
    }


def has_transformer_engine() -> bool:
    """Can Megatron use it?"""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)
