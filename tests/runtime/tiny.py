"""A tiny hybrid model and what a training step needs; imported only inside spawned processes.

Megatron imports stand inside functions, so that a case may watch what happens before the adaptations.
"""

from typing import Any

import torch
from torch import Tensor

PATTERN = "M*EM-E"
VOCABULARY, LENGTH, BATCH = 64, 32, 2


def squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


def config(**overrides: Any) -> Any:
    from megatron.core.transformer import TransformerConfig

    from elastic_megatron import runtime

    fields: dict[str, Any] = dict(
        num_layers=len(PATTERN),
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=False,
        activation_func=squared_relu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mamba_state_dim=8,
        mamba_head_dim=8,
        mamba_num_groups=2,
        mamba_num_heads=4,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=24,
        moe_shared_expert_intermediate_size=40,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="seq_aux_loss",
        moe_aux_loss_coeff=1e-4,
        moe_token_dispatcher_type="alltoall",
        is_hybrid_model=True,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32,
    )
    return TransformerConfig(**(fields | runtime.transformer_config_defaults() | overrides))


def model(pattern: str = PATTERN, spec: Any = None, **overrides: Any) -> Any:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from elastic_megatron import runtime

    built = HybridModel(
        config(**({"num_layers": len(pattern.split("/")[0])} | overrides)),
        spec or runtime.hybrid_stack_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        hybrid_layer_pattern=pattern,
        pg_collection=runtime.groups(),
        position_embedding_type="none",
        parallel_output=True,
    )
    runtime.one_optimizer_layout(built)
    return built


def batch() -> dict[str, Tensor]:
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "positions": positions}


def loss(built: Any) -> Tensor:
    b = batch()
    return built(b["tokens"], b["positions"], None, labels=b["labels"]).mean()


class Trainer:
    """Megatron's DDP, its optimizer and its gradient finalisation around a tiny model."""

    def __init__(self, built: Any, distributed_optimizer: bool = True) -> None:
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=distributed_optimizer
        )
        self.model = DistributedDataParallel(built.config, ddp, built)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                weight_decay=0.01,
                clip_grad=1.0,
                params_dtype=torch.float32,
                use_distributed_optimizer=distributed_optimizer,
            ),
            [self.model],
        )

    def step(self) -> float:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        def forward_step(data: Any, built: Any) -> Any:
            def reduce(output: Tensor) -> Any:
                return output.mean(), output.mean().detach()

            b = next(data)
            return built(b["tokens"], b["positions"], None, labels=b["labels"]), reduce

        from megatron.core.distributed import finalize_model_grads

        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([batch()]),
            model=self.model,
            num_microbatches=1,
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        done, norm, _ = self.optimizer.step()
        assert done and norm > 0
        return float(losses[0])

    def sharded(self, *, is_loading: bool) -> dict[str, Any]:
        from elastic_megatron import runtime

        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "singleton_local_shards": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": runtime.groups().dp_cp,
        }
        state = {"model": self.model.module.sharded_state_dict(metadata=metadata)}
        state["optimizer"] = self.optimizer.sharded_state_dict(
            state, is_loading=is_loading, metadata=metadata
        )
        return state

    def save(self, folder: str) -> None:
        from megatron.core import dist_checkpointing

        dist_checkpointing.save(self.sharded(is_loading=False), folder)

    def load(self, folder: str) -> None:
        from megatron.core import dist_checkpointing

        state = dist_checkpointing.load(self.sharded(is_loading=True), folder)
        self.model.module.load_state_dict(state["model"], strict=True)
        with torch.no_grad():
            self.optimizer.load_state_dict(state["optimizer"])
