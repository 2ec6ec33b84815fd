"""A tiny hybrid model in the words of recipes, of Megatron's configs and of Megatron-LM's flags."""

from __future__ import annotations

from typing import Any

import torch

SIZES = {
    "hybrid_layer_pattern": "ME*-",
    "hidden_size": 24,
    "vocab_size": 264,
    "max_position_embeddings": 64,
    "ffn_hidden_size": 20,
    "mamba_num_heads": 4,
    "mamba_head_dim": 6,
    "mamba_state_dim": 5,
    "mamba_num_groups": 2,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 6,
    "num_moe_experts": 6,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 10,
    "moe_shared_expert_intermediate_size": 12,
}
SPACE = {
    "choices": {
        "hidden_size": [16, 20],
        "num_moe_experts": [4, 2],
        "mamba_num_heads": [2],
        "ffn_hidden_size": [10],
        "num_layers": [3],
    },
    "lanes": {"num_moe_experts": 2, "ffn_hidden_size": 2},
    "per_layer": ["num_moe_experts"],
}
_OF_MODEL = ("hybrid_layer_pattern", "vocab_size")


def transformer_fields(**changes: Any) -> dict[str, Any]:
    """Fields of a ``TransformerConfig`` with these sizes, the numerics of nemotron_h, for a CPU."""
    from megatron.core.activations import squared_relu

    sizes = {f: v for f, v in SIZES.items() if f not in (*_OF_MODEL, "max_position_embeddings")}
    fixed = {
        "num_layers": len(SIZES["hybrid_layer_pattern"]),
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": False,
        "activation_func": squared_relu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "params_dtype": torch.float32,
        "is_hybrid_model": True,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }
    return sizes | fixed | changes


def flags() -> list[str]:
    """The same model as arguments of Megatron-LM; all but the last line also hold on a GPU."""
    sizes = {f: v for f, v in SIZES.items() if f not in ("num_moe_experts", "num_query_groups")}
    named = [item for f, v in sizes.items() for item in ("--" + f.replace("_", "-"), str(v))]
    return [
        *named,
        *(
            "--num-layers",
            str(len(SIZES["hybrid_layer_pattern"])),
            "--num-experts",
            str(SIZES["num_moe_experts"]),
        ),
        *("--group-query-attention", "--num-query-groups", str(SIZES["num_query_groups"])),
        *(
            "--moe-router-score-function",
            "sigmoid",
            "--moe-router-enable-expert-bias",
            "--moe-router-dtype",
            "fp32",
        ),
        *("--moe-token-dispatcher-type", "alltoall", "--squared-relu", "--normalization", "RMSNorm"),
        *(
            "--disable-bias-linear",
            "--untie-embeddings-and-output-weights",
            "--position-embedding-type",
            "none",
        ),
        *("--hidden-dropout", "0", "--attention-dropout", "0", "--make-vocab-size-divisible-by", "4"),
        *(
            "--tokenizer-type",
            "NullTokenizer",
            "--transformer-impl",
            "local",
            "--no-gradient-accumulation-fusion",
        ),
        *("--no-masked-softmax-fusion", "--no-bias-dropout-fusion", "--no-persist-layer-norm"),
        *("--use-cpu-initialization", "--distributed-backend", "gloo"),
    ]
