"""Leaves of a Megatron model on ``paper_kernels``, and Megatron made to use them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from counting import kernel, synchronise
from paper_kernels import Attention as AttentionKernel
from paper_kernels import Gemm, Norm, Rows, Scan, SquaredRelu, new
from torch import Tensor, nn


def compile_activations(model: nn.Module) -> None:
    """One kernel for each activation, as torch.compile makes it."""
    from megatron.core.activations import squared_relu
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    for module in model.modules():
        if getattr(module, "activation_func", None) is squared_relu and not isinstance(module, TEGroupedMLP):
            module.activation_func = lambda x: SquaredRelu.apply(x, None)


def settle(model: nn.Module) -> nn.Module:
    """A model on these leaves as training has it: activations compiled, gradients added to fp32 sums as DDP does."""
    compile_activations(model)
    for p in model.parameters():
        p.main_grad = new(p, p.shape, torch.float32)  # type: ignore[attr-defined]
        p.register_post_accumulate_grad_hook(_add_to_sum)
    return model.train()


def _add_to_sum(p: Tensor) -> None:
    if p.grad is not None:  # else its GEMM has added it
        p.main_grad.add_(p.grad)  # type: ignore[attr-defined]
        p.grad = None


class Linear(nn.Module):
    """In the place of ``TEColumnParallelLinear`` and ``TERowParallelLinear``."""

    def __init__(self, inputs: int, outputs: int, *, config: Any, **_: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype, device="meta"))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return Gemm.apply(x, self.weight), None


class NormLinear(Linear):
    """In the place of ``TELayerNormColumnParallelLinear``."""

    def __init__(self, inputs: int, outputs: int, *, config: Any, **_: Any) -> None:
        super().__init__(inputs, outputs, config=config)
        self.layer_norm_weight = nn.Parameter(torch.empty(inputs, dtype=config.params_dtype, device="meta"))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(Norm.apply(x, self.layer_norm_weight))


class GroupedLinear(nn.Module):
    """In the place of ``TEColumnParallelGroupedLinear`` and ``TERowParallelGroupedLinear``."""

    def __init__(self, experts: int, inputs: int, outputs: int, *, config: Any, **_: Any) -> None:
        super().__init__()
        self.experts = experts
        for i in range(experts):
            weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype, device="meta"))
            weight.allreduce = False  # type: ignore[attr-defined]
            self.register_parameter(f"weight{i}", weight)

    def forward(self, x: Tensor, splits: Any) -> tuple[Tensor, None]:
        return Gemm.apply(x, *(getattr(self, f"weight{i}") for i in range(self.experts))), None


class Attention(nn.Module):
    """In the place of ``TEDotProductAttention``."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return AttentionKernel.apply(query, key, value)


def _scan(rows: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, a: Tensor, D: Tensor, chunk_size: int,
          headdim: int, ngroups: int, **_: Any) -> Tensor:  # fmt: skip
    return Scan.apply(rows, weight, bias, dt_bias, a, D, chunk_size, headdim, ngroups)


def _permute(
    tokens: Tensor, probs: Tensor, where: Tensor, num_out_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    kernel("row_map", [where], [], launches=3)
    return *Rows.apply(tokens, probs, num_out_tokens, 1), where


def _unpermute(tokens: Tensor, where: Tensor, *, restore_shape: torch.Size, **_: Any) -> Tensor:
    return Rows.apply(tokens, None, restore_shape[0], 1)[0]


def _sort(tokens: Tensor, *_: Any) -> Tensor:
    return Rows.apply(tokens, None, tokens.shape[0], 2)[0]


def _sort_with_probs(tokens: Tensor, probs: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return Rows.apply(tokens, probs, tokens.shape[0], 2)


def _router_gemm(a: Tensor, b: Tensor, dtype: torch.dtype, *, layout: str, **_: Any) -> tuple[Tensor]:
    """``te_general_gemm``; b [tokens, ...], a the weight, but for ``NT`` the input."""
    shape = {
        "TN": (*b.shape[:-1], a.shape[0]),
        "NN": (*b.shape[:-1], a.shape[1]),
        "NT": (b.shape[1], a.shape[1]),
    }
    out = new(a, shape[layout], dtype)
    kernel("gemm", [a, b], [out], flops=2 * b.numel() * (a.shape[0] if layout == "TN" else a.shape[1]))
    return (out,)


def spec() -> Any:
    """Megatron's stock hybrid spec as it is with Transformer Engine, of the leaves above."""
    import copy
    from functools import partial

    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

    from elastic_megatron.runtime import hybrid_stack_spec

    made = copy.deepcopy(hybrid_stack_spec("local"))
    mamba, attention = made.submodules.mamba_layer.submodules, made.submodules.attention_layer.submodules
    mamba.norm, attention.input_layernorm = IdentityOp, IdentityOp
    mamba.mixer.submodules.in_proj, mamba.mixer.submodules.out_proj = NormLinear, Linear
    inner = attention.self_attention.submodules
    inner.linear_qkv, inner.linear_proj, inner.core_attention = NormLinear, Linear, Attention
    grouped = GroupedMLPSubmodules(linear_fc1=GroupedLinear, linear_fc2=GroupedLinear)
    moe = MoESubmodules(
        experts=partial(TEGroupedMLP, submodules=grouped),
        shared_experts=partial(
            SharedExpertMLP, submodules=MLPSubmodules(linear_fc1=Linear, linear_fc2=Linear)
        ),
    )
    made.submodules.moe_layer.submodules.mlp = partial(MoELayer, submodules=moe)
    return made


@contextmanager
def installed(rows: int) -> Iterator[None]:
    """Megatron calls these kernels where it would call a GPU's, and builds models on the ``meta`` device.

    Args:
        rows: that a rank's tokens send to experts; they are spread evenly.
    """
    from megatron.core.ssm import mamba_mixer
    from megatron.core.transformer.moe import experts, moe_utils, token_dispatcher

    from elastic_megatron.runtime import leaves, ssd, standins

    def norm(self: Any, x: Tensor) -> Tensor:
        return Norm.apply(x, self.weight)

    def weighted(x: Tensor, probs: Tensor) -> Tensor:
        return SquaredRelu.apply(x, probs)

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """The dispatcher's counts, whose sizes it needs; it waits for them at an event."""
        if not torch.is_tensor(tensor):
            return tensor
        even = torch.full(tensor.shape, rows // tensor.numel())
        return even.numpy() if as_numpy else even

    def patch(owner: Any, **values: Callable[..., Any] | bool) -> Any:
        return mock.patch.multiple(owner, **values)

    with (
        patch(torch.cuda, current_device=lambda: torch.device("meta")),
        patch(mamba_mixer, mamba_split_conv1d_scan_combined=_scan),
        patch(leaves.TorchRMSNorm, forward=norm),
        patch(ssd.RMSNormGated, forward=norm),
        patch(experts, weighted_squared_relu_impl=weighted),
        patch(token_dispatcher, maybe_move_tensor_to_cpu=to_host),
        patch(standins.Event, synchronize=lambda _: synchronise()),
        patch(moe_utils, HAVE_TE=True, fused_permute_with_probs=_permute, fused_unpermute=_unpermute,
              fused_permute=_permute, fused_sort_chunks_by_index=_sort, te_general_gemm=_router_gemm,
              fused_sort_chunks_by_index_with_probs=_sort_with_probs, is_te_min_version=lambda _: False),
    ):  # fmt: skip
        yield
