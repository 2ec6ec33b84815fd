"""From a ``ParentShape`` to a Megatron ``HybridModel``, stock or elastic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.activations import squared_relu  # its fused kernels know it by this function
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import nn

from .. import runtime
from ..space import ElasticSpace, ParentShape, SubmodelSpec, stage_layers
from .specs import elastic_hybrid_stack_spec, sliced_stack_spec, with_mamba_sizes


def transformer_config(parent: ParentShape, dtype: torch.dtype, **overrides: Any) -> TransformerConfig:
    """Megatron's config of a Nemotron-H style model under the running parallel layout; ``overrides`` win.

    The numerics are those of transformers' ``nemotron_h``: sigmoid routing with a correction bias in fp32,
    weights renormalised over the top-k and scaled, squared ReLU, RMSNorm, no positional encoding, no biases.
    """
    fields: dict[str, Any] = {
        **runtime.transformer_config_defaults(),
        "num_layers": parent.num_layers,
        "hidden_size": parent.hidden_size,
        "ffn_hidden_size": parent.ffn_hidden_size or 4 * parent.hidden_size,
        # Megatron divides heads over tensor ranks also where no layer has any
        "num_attention_heads": parent.num_attention_heads or runtime.layout().tensor,
        "num_query_groups": parent.num_query_groups or runtime.layout().tensor,
        "kv_channels": parent.kv_channels or parent.hidden_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": parent.layernorm_epsilon,
        "add_bias_linear": False,
        "gated_linear_unit": False,
        "activation_func": squared_relu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "is_hybrid_model": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "calculate_per_token_loss": True,
    }
    if "M" in parent.hybrid_layer_pattern:
        fields |= {
            name: getattr(parent, name)
            for name in ("mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "mamba_num_groups")
        }
    if "E" in parent.hybrid_layer_pattern:
        fields |= {
            "num_moe_experts": parent.num_moe_experts,
            "moe_router_topk": parent.moe_router_topk,
            "moe_ffn_hidden_size": parent.moe_ffn_hidden_size,
            "moe_shared_expert_intermediate_size": parent.moe_shared_expert_intermediate_size or None,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,
            "moe_router_topk_scaling_factor": parent.moe_router_topk_scaling_factor,
            "moe_router_dtype": "fp64" if dtype is torch.float64 else "fp32",
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_token_dispatcher_type": "alltoall",
        }
    return TransformerConfig(**{**fields, **overrides})


def build_model(
    parent: ParentShape,
    *,
    dtype: torch.dtype = torch.float32,
    spec: ModuleSpec | None = None,
    config: TransformerConfig | None = None,
    vp_stage: int | None = None,
    **overrides: Any,
) -> HybridModel:
    """This rank's pipeline chunk of a stock ``HybridModel`` of that shape, the whole model without a pipeline.

    Args:
        spec: another stack.
        vp_stage: which chunk, with a virtual pipeline.
        overrides: go to the config.
    """
    layout, groups = runtime.layout(), runtime.groups()
    chunks = layout.virtual_pipeline or 1
    place = (vp_stage or 0) * layout.pipeline + groups.pp.rank()
    stages = stage_layers(parent.num_layers, layout.pipeline * chunks)
    model = HybridModel(
        config or transformer_config(parent, dtype, **overrides),
        with_mamba_sizes(spec or runtime.hybrid_stack_spec(), parent),
        vocab_size=parent.vocab_size,
        max_sequence_length=parent.max_position_embeddings,
        hybrid_layer_pattern="|".join(parent.hybrid_layer_pattern[s.start : s.stop] for s in stages),
        pre_process=place == 0,
        post_process=place == len(stages) - 1,
        share_embeddings_and_output_weights=parent.tie_embeddings,
        parallel_output=True,
        position_embedding_type="none",
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    # Megatron keeps D in the default dtype and A_log in fp32 whatever params_dtype says
    runtime.one_optimizer_layout(model)
    return model.double() if dtype is torch.float64 else model


def build_chunks(build: Callable[[int | None], nn.Module]) -> list[nn.Module]:
    """``build(vp_stage)`` for every pipeline chunk of this rank, in order; one chunk without a virtual pipeline."""
    chunks = runtime.layout().virtual_pipeline
    return [build(None)] if chunks is None else [build(v) for v in range(chunks)]


def build_elastic_model(space: ElasticSpace, **kwargs: Any) -> HybridModel:
    """A ``HybridModel`` over the elastic stack; arguments as ``build_model``."""
    spec = elastic_hybrid_stack_spec(space, kwargs.pop("spec", None) or runtime.hybrid_stack_spec())
    return build_model(space.parent, spec=spec, **kwargs)


def build_sliced_model(space: ElasticSpace, submodel: SubmodelSpec, **kwargs: Any) -> HybridModel:
    """An empty plain model shaped like a submodel; per-layer widths become per-layer configs."""
    layers = space.kept_layers(submodel)
    overrides = [space.layer_sizes(submodel, i) for i in layers]
    uniform = {a: max(w) if isinstance(w, tuple) else w for a in submodel for w in (submodel[a],)}
    shape = space.shape_of(SubmodelSpec.of(uniform))
    spec = kwargs.pop("spec", None) or runtime.hybrid_stack_spec()
    if submodel.heterogeneous:
        spec = sliced_stack_spec(spec, overrides)
    return build_model(shape, spec=spec, **kwargs)
