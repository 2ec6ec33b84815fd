"""Steps ``router`` and ``mamba``: kernels against torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elastic_megatron import runtime
from elastic_megatron.blocks import SlicedModel, build_elastic_model
from elastic_megatron.runtime import ssd
from gpu.bench import Bench, Skipped
from gpu.models import Numbers, relative, scale

# rounding of a product's operands: TF32, in which GPUs multiply fp32, has 10 bits after the leading one, BF16 7
LIMITS = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
Tensors = dict[str, Tensor]


def router(bench: Bench) -> None:
    """The gating GEMM of a submodel that cuts ``hidden_size`` alone is torch's product, backwards too.

    Megatron gives it to Transformer Engine wherever that imports, whose kernels know no strides. What they make of a
    strided view is told, without a limit: the submodel's weight must be dense.
    """
    from megatron.core.transformer.moe import moe_utils

    if getattr(moe_utils, "te_general_gemm", None) is None:
        bench.stands_in("torch's product in place of Transformer Engine's GEMM")
    sizes, device = scale(bench), runtime.start(seed=1).device
    space = sizes.space("E")
    narrow = sizes.narrow(space, "hidden_size")
    dtype = torch.bfloat16
    model = build_elastic_model(space, dtype=dtype, gradient_accumulation_fusion=False).to(device)
    kept = SlicedModel(model).model_of(narrow).decoder.layers[0].mlp.router.weight
    whole = model.decoder.layers[0].mlp.router.weight.detach()
    cut = whole[:, : kept.shape[1]]
    x = torch.randn(sizes.length, 1, kept.shape[1], device=device, dtype=dtype)
    gradient = torch.randn(sizes.length, 1, kept.shape[0], device=device)
    truth = _gated(x, cut, gradient, lambda x, w: x.double() @ w.double().t())
    gate = partial(moe_utils.router_gating_linear, bias=None, router_dtype=torch.float32)
    for what, weight in (("dense weight", cut.contiguous()), ("weight of the submodel", kept.detach())):
        for name, error in _errors(_gated(x, weight, gradient, gate), truth):
            bench.at_most(f"{what}, {name}", error, LIMITS[dtype])
    strided = "strided view, worst (large: the kernel ignores strides)"
    try:
        bench.number(strided, max(error for _, error in _errors(_gated(x, cut, gradient, gate), truth)))
    except (AssertionError, RuntimeError, ValueError) as refused:
        bench.says(strided, f"refused: {refused}")


def _gated(x: Tensor, weight: Tensor, gradient: Tensor, gate: Callable[[Tensor, Tensor], Tensor]) -> Tensors:
    """Logits and gradients; the weight keeps its strides."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    logits = gate(x, weight)
    logits.backward(gradient.to(logits.dtype))
    assert x.grad is not None and weight.grad is not None
    return {"logits": logits.detach(), "gradient of inputs": x.grad, "gradient of weights": weight.grad}


@dataclass(frozen=True)
class Mamba:
    """The functions that Mamba-2 takes from mamba-ssm and causal-conv1d, or torch's."""

    scan: Callable[..., Any]
    convolution: Callable[[Tensor, Tensor, Tensor], Tensor]
    norm: type


def mamba(bench: Bench) -> None:
    """Forward and backward, beside the same in fp64 of torch, on the head counts and lengths that are trained."""
    sizes, device = scale(bench), runtime.start(seed=1).device
    theirs, truth = (
        _kernels(bench),
        Mamba(ssd.mamba_split_conv1d_scan_combined, _convolution, ssd.RMSNormGated),
    )
    for dtype, limit in LIMITS.items():
        worst: dict[str, tuple[float, str]] = {}
        for length in sizes.lengths:
            for heads in sizes.heads:
                numbers = Numbers(device, dtype, seed=heads + length)
                for kernel, run in _cases(sizes, heads, length, numbers):
                    for name, error in _errors(run(theirs, dtype), run(truth, torch.float64)):
                        where = f"{name}, {heads} heads, {length:,} tokens"
                        worst[kernel] = max(worst.get(kernel, (0.0, "")), (error, where))
        for kernel, (error, where) in worst.items():
            bench.at_most(f"{kernel} in {_short(dtype)}: {where}", error, limit)


def _kernels(bench: Bench) -> Mamba:
    if bench.rehearse:
        bench.stands_in("the scan, convolution and norm of elastic_megatron/runtime, in torch")
        return Mamba(ssd.mamba_split_conv1d_scan_combined, _convolution, ssd.RMSNormGated)
    try:
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.triton.layernorm_gated import RMSNorm
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
    except ImportError as e:
        raise Skipped(f"{e}: install mamba-ssm and causal-conv1d (docs/install_gpu.md)") from None
    return Mamba(mamba_split_conv1d_scan_combined, partial(causal_conv1d_fn, activation="silu"), RMSNorm)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[batch, channels, length], as ``causal_conv1d_fn``."""
    return ssd.causal_conv1d(x.transpose(1, 2), weight, bias).transpose(1, 2)


def _cases(
    sizes: Any, heads: int, length: int, numbers: Numbers
) -> Iterator[tuple[str, Callable[..., Tensors]]]:
    """(kernel, what runs it by some functions in some type), all on the same numbers, as Megatron calls them."""
    shape = sizes.parent
    dim, groups = shape.mamba_head_dim, shape.mamba_num_groups
    inner, channels = heads * dim, heads * dim + 2 * groups * shape.mamba_state_dim
    weight, bias = numbers(channels, shape.conv_kernel) / 2, numbers(channels) / 2
    vectors = {"dt_bias": numbers(heads) - 2, "A": -numbers(heads).abs() - 0.1, "D": numbers(heads)}

    def scan(kernel: Mamba, dtype: torch.dtype) -> Tensors:
        # A and D stay in fp32 beside a bf16 model
        wide = torch.promote_types(dtype, torch.float32)
        t = _leaves({"zxbcdt": whole, "weight": weight, "bias": bias}, dtype) | _leaves(vectors, wide)
        out = kernel.scan(
            t["zxbcdt"], t["weight"], t["bias"], t["dt_bias"], t["A"], D=t["D"], chunk_size=shape.mamba_chunk_size,
            activation="silu", headdim=dim, ngroups=groups, norm_before_gate=False,
        )  # fmt: skip
        return _passed(out, t)

    def convolution(kernel: Mamba, dtype: torch.dtype) -> Tensors:
        t = _leaves({"x": whole[..., inner : inner + channels], "weight": weight, "bias": bias}, dtype)
        return _passed(kernel.convolution(t["x"].transpose(1, 2), t["weight"], t["bias"]), t)

    def norm(kernel: Mamba, dtype: torch.dtype) -> Tensors:
        made = kernel.norm(inner, eps=1e-5, group_size=inner // groups, norm_before_gate=False)
        made = made.to(device=whole.device, dtype=dtype)
        t = _leaves({"x": whole[..., :inner], "z": whole[..., inner : 2 * inner]}, dtype)
        return _passed(made(t["x"], t["z"]), t | {"weight": made.weight})

    whole = numbers(1, length, inner + channels + heads)
    yield from (("scan", scan), ("convolution", convolution), ("gated norm", norm))


def _leaves(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {n: t.detach().to(dtype).contiguous().requires_grad_() for n, t in tensors.items()}


def _passed(out: Tensor, leaves: Tensors) -> Tensors:
    """The output and the gradients of a loss that weighs every element differently."""
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    # rounded, so that they are the same in every type
    (out * weights.bfloat16().to(out.dtype)).sum().backward()
    return {"output": out.detach()} | {
        f"gradient of {n}": t.grad for n, t in leaves.items() if t.grad is not None
    }


def _errors(found: Tensors, truth: Tensors) -> list[tuple[str, float]]:
    return [(name, relative(found[name], truth[name])) for name in truth]


def _short(dtype: torch.dtype) -> str:
    return "fp32" if dtype is torch.float32 else "bf16"
