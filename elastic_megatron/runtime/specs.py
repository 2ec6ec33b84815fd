"""Layer specs of the hybrid stack: Megatron's own where Transformer Engine is installed, else a local one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from elastic_megatron.errors import UserError

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec


def hybrid_stack_spec(impl: Literal["auto", "te", "local"] = "auto") -> ModuleSpec:
    """The ``HybridStack`` spec for ``HybridModel``.

    ``"te"`` is Megatron's stock ``hybrid_stack_spec``; ``"local"`` builds Mamba (``M``), attention
    (``*``), MLP (``-``) and MoE (``E``) layers and MTP blocks from Megatron's own parallel linears and plain
    torch leaves.  Both write the same sharded checkpoint keys, so a checkpoint trained with one loads
    into the other.  ``"auto"`` is ``"te"`` where it is installed.  Raises ``UserError`` for ``"te"`` without it.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if impl not in ("auto", "te", "local"):
        raise UserError(f"transformer implementation {impl!r} is unknown: choose auto, te or local")
    if impl == "te" and not HAVE_TE:
        raise UserError("transformer implementation 'te' needs transformer_engine: install it or choose auto")
    if impl == "local" or not HAVE_TE:
        return _local_spec()
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as stock

    return stock


def _local_spec() -> ModuleSpec:
    """The stock spec with each fused norm-and-linear taken apart.

    Transformer Engine stores a layer's input norm inside the linear that follows it; the key maps
    give the separate norm the same name on disk.
    """
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=_mamba_layer(),
            attention_layer=_attention_layer(),
            mlp_layer=_mlp_layer(),
            moe_layer=_moe_layer(),
            mtp_block_spec=_mtp_block(),
        ),
    )


def _mamba_layer() -> ModuleSpec:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec

    from elastic_megatron.runtime.leaves import TorchRMSNorm

    mixer = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=TorchRMSNorm,
            mixer=ModuleSpec(module=MambaMixer, submodules=mixer),
            mamba_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
        ),
    )


def _attention_layer() -> ModuleSpec:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from elastic_megatron.runtime.leaves import TorchCoreAttention, TorchRMSNorm

    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=TorchCoreAttention,
            linear_proj=RowParallelLinear,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TorchRMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
        ),
    )


def _mlp_layer() -> ModuleSpec:
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    from elastic_megatron.runtime.leaves import TorchRMSNorm

    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=TorchRMSNorm,
            mlp=partial(MLP.as_mlp_submodule, submodules=linears),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
        ),
    )


def _moe_layer() -> ModuleSpec:
    """Routed experts are ``SequentialMLP``, recognised by ModelOpt; their number comes from the config.

    ``get_moe_module_spec`` asks for a number of experts and then ignores it, so the layer is spelt out here.
    """
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayerSubmodules

    from elastic_megatron.runtime.leaves import TorchRMSNorm

    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    experts = MoESubmodules(
        experts=partial(SequentialMLP, submodules=linears),
        shared_experts=partial(SharedExpertMLP, submodules=linears),
    )
    return ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=TorchRMSNorm,
            mlp=partial(MoELayer, submodules=experts),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _mtp_block() -> ModuleSpec:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.multi_token_prediction import (
        MultiTokenPredictionBlock,
        MultiTokenPredictionBlockSubmodules,
        MultiTokenPredictionLayer,
        MultiTokenPredictionLayerSubmodules,
    )
    from megatron.core.transformer.spec_utils import ModuleSpec

    from elastic_megatron.runtime.leaves import TorchRMSNorm

    layer = MultiTokenPredictionLayerSubmodules(
        enorm=TorchRMSNorm,
        hnorm=TorchRMSNorm,
        eh_proj=ColumnParallelLinear,
        mtp_model_layer=None,
        layer_norm=TorchRMSNorm,
    )
    return ModuleSpec(
        module=MultiTokenPredictionBlock,
        submodules=MultiTokenPredictionBlockSubmodules(
            layer_specs=[ModuleSpec(module=MultiTokenPredictionLayer, submodules=layer)]
        ),
    )
