"""Leaves of the local layer spec: plain torch modules with the constructors of the TE ones.

Importing this module imports Megatron.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from elastic_megatron.errors import UserError


class TorchRMSNorm(torch.nn.RMSNorm):
    """RMSNorm over the last dimension in place of ``TENorm``; the statistics are fp32 (fp64 for fp64).

    ``WrappedTorchNorm`` refuses sequence parallelism; this one carries the attribute by which
    ``finalize_model_grads`` sums the weight's gradient over tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        if config.normalization != "RMSNorm":
            raise UserError(
                f"normalization={config.normalization!r} in the model config: the local layer spec has RMSNorm only"
            )
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class TorchCoreAttention(MegatronModule):
    """Causal ``scaled_dot_product_attention`` in place of ``TEDotProductAttention``.

    Query, key and value come as ``[sequence, batch, heads, head_dim]``, keys and values possibly
    with fewer heads; the result is ``[sequence, batch, heads * head_dim]``.  ``AttnMaskType.no_mask``
    is a decoding step: the query is the last token, which may see all keys.  Under context parallelism
    each rank holds chunks ``r`` and ``2*cp-1-r`` of the sequence (Megatron's zig-zag order) and gathers
    all keys and values.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.cp_group = pg_collection.cp
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        if packed_seq_params is not None or attention_bias is not None:
            raise UserError(
                "packed sequences and attention biases need Transformer Engine: train unpacked here"
            )
        mask = None
        if self.cp_group.size() > 1:
            mask = self._zigzag_mask(query.shape[0], query.device)
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and attn_mask_type is not AttnMaskType.no_mask,
            scale=self.softmax_scale,
            dropout_p=self.dropout if self.training else 0.0,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _zigzag_mask(self, local_length: int, device: torch.device) -> Tensor:
        """``[local_length, cp * local_length]`` booleans: the query may see the key."""
        cp, rank = self.cp_group.size(), self.cp_group.rank()
        chunks = torch.arange(local_length * cp, device=device).view(2 * cp, -1)
        positions = [torch.cat([chunks[r], chunks[2 * cp - 1 - r]]) for r in range(cp)]
        return positions[rank][:, None] >= torch.cat(positions)[None, :]


class DuplicatedLinear(torch.nn.Linear):
    """``TELinear(parallel_mode="duplicated")``: the whole weight on each tensor-parallel rank.

    Megatron's latent MoE projections use it.  Returns ``(output, None)`` as every Megatron linear.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Any,
        bias: bool,
        parallel_mode: str = "duplicated",
        **_: Any,
    ) -> None:
        assert parallel_mode == "duplicated", parallel_mode
        super().__init__(input_size, output_size, bias=bias, dtype=config.params_dtype)
        init_method(self.weight)
        for parameter in self.parameters():
            parameter.allreduce = True
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None
