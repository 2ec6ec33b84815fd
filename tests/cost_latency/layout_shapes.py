"""Nemotron 3 Nano 30B-A3B, and a small dense hybrid."""

from elastic_megatron.space import ParentShape

NANO = ParentShape(
    "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", hidden_size=2688, vocab_size=131072,
    num_moe_experts=128, moe_router_topk=6, moe_ffn_hidden_size=1856,
    moe_shared_expert_intermediate_size=3712, mamba_num_heads=64,
    mamba_head_dim=64, mamba_state_dim=128, mamba_num_groups=8, num_attention_heads=32,
    num_query_groups=2, kv_channels=128,
)  # fmt: skip
DENSE = ParentShape(
    "M-M*M-", hidden_size=256, vocab_size=1024, ffn_hidden_size=1000, mamba_num_heads=16, mamba_head_dim=16,
    mamba_state_dim=16, mamba_num_groups=4, num_attention_heads=12, num_query_groups=4, kv_channels=16,
)  # fmt: skip
