"""Attach elasticity to a stock layer: hooks on its leaves that read the widths bound for this call.

Leaves stay stock classes, so state-dict keys survive and ModelOpt still recognises them (it converts a
subclass only where ``forward`` is not overridden; a pre-hook runs before its input quantiser). The hooks hold
no state of their own: they read ``Binding.widths``, which the stack sets around one call of the layer, from
tensors that recomputation passes as explicit arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.parallel import scale_gradient
from ..ops.saving import recomputed, rescaled
from ..space import ElasticSpace
from .widths import LayerWidths


class Binding:
    """The widths that one layer runs with during one call; ``None`` outside calls and for the plain parent.

    Args:
        replicas: how many ranks compute the same residual stream: the tensor-parallel ones without sequence
            parallelism. Each then takes that share of the gradient of what acts on the stream.
    """

    def __init__(self, replicas: int = 1) -> None:
        self.widths: LayerWidths | None = None
        self.replicas = replicas

    @contextmanager
    def bound(self, widths: LayerWidths | None) -> Iterator[None]:
        before, self.widths = self.widths, widths
        try:
            yield
        finally:
            self.widths = before

    def get(self, field: str) -> Tensor | None:
        return getattr(self.widths, field) if self.widths is not None else None

    def get_shared(self, field: str) -> Tensor | None:
        """As ``get``, for use on the residual stream."""
        value = self.get(field)
        return value if value is None or self.replicas == 1 else scale_gradient(value, 1 / self.replicas)


def attach(layer: nn.Module, symbol: str, space: ElasticSpace, replicas: int = 1) -> Binding:
    """Install the hooks of one stock layer. Raises ``ValueError`` where a fused path would bypass a leaf."""
    binding = Binding(replicas)
    input_norm = _input_norm(layer, symbol)
    stream_norm_scale(input_norm, binding, sharded_output=hasattr(input_norm, "layer_norm_weight"))
    if symbol == "M":
        _scale_output(layer.mixer.norm, partial(binding.get, "channel_scale"))
        mask_input(layer.mixer.norm, binding, "channels")
        mask_output(layer.mixer.out_proj, binding, "write")
        layer.mixer.bind(binding)
    elif symbol == "*":
        mask_input(layer.self_attention.linear_proj, binding, "channels")
        mask_output(layer.self_attention.linear_proj, binding, "write")
    elif symbol == "-":
        _refuse_fused(layer.mlp)
        mask_input(layer.mlp.linear_fc2, binding, "channels")
        mask_output(layer.mlp.linear_fc2, binding, "write")
    else:
        for fc2 in _expert_outputs(layer.mlp.experts):
            mask_input(fc2, binding, "channels")
        if layer.mlp.shared_experts is not None:
            mask_input(layer.mlp.shared_experts.linear_fc2, binding, "shared")
        mask_output(layer.mlp, binding, "write")
        layer.mlp.router.bind(binding, space)
    return binding


def mask_input(module: nn.Module, binding: Binding, field: str) -> None:
    """Multiply a module's first argument by the mask, before any input quantiser.

    What the module saves of the product for its backward pass is computed again there, once.
    """
    entered: list[tuple[Tensor, Tensor, Tensor]] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        entered.clear()  # of a call that failed
        mask = binding.get(field)
        if mask is None:
            return None
        x, mask = args[0], mask.to(args[0].dtype)
        product = x * mask
        if mask.requires_grad and torch.is_grad_enabled() and product.numel():
            entered.append((product, x, mask))
        return product, *args[1:]

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if entered:
            out = output[0] if isinstance(output, tuple) else output
            recomputed(*entered.pop(), before=out.grad_fn)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def mask_output(module: nn.Module, binding: Binding, field: str) -> None:
    """Multiply what a module writes to the residual stream (the first of an ``(output, bias)`` pair)."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        mask = binding.get_shared(field)
        return None if mask is None else _first(output, lambda x: x * mask.to(x.dtype))

    module.register_forward_hook(hook)


def stream_norm_scale(module: nn.Module, binding: Binding, *, sharded_output: bool = False) -> None:
    """RMSNorm of the residual stream, which is s times the masked one: output x 1/s (see ``widths.hidden_scale``).

    ``module`` is a norm, or a linear with the norm fused into its input: no bias follows, so scaling its
    output, of which every tensor rank has a part of its own (``sharded_output``), is the same.
    """
    get = binding.get if sharded_output else binding.get_shared
    _scale_output(module, partial(get, "hidden_scale"))


def _scale_output(module: nn.Module, scale: Callable[[], Tensor | None]) -> None:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        s = scale()
        return None if s is None else _first(output, lambda x: rescaled(x, s.reciprocal()))

    module.register_forward_hook(hook)


def _first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, tuple):
        return change(output[0]), *output[1:]
    return change(output)


def _input_norm(layer: nn.Module, symbol: str) -> nn.Module:
    """The module that normalises the layer's input: a norm of its own, or the linear it is fused into."""
    from megatron.core.transformer.identity_op import IdentityOp

    norm, fused = {
        "M": lambda: (layer.norm, layer.mixer.in_proj),
        "*": lambda: (layer.input_layernorm, layer.self_attention.linear_qkv),
        "E": lambda: (layer.pre_mlp_layernorm, None),
        "-": lambda: (layer.pre_mlp_layernorm, layer.mlp.linear_fc1),
    }[symbol]()
    if not isinstance(norm, IdentityOp):
        return norm
    if fused is None or not hasattr(fused, "layer_norm_weight"):
        raise ValueError(f"a {symbol!r} layer has no input norm that elastic widths could be scaled at")
    return fused


def _expert_outputs(experts: Any) -> list[nn.Module]:
    if hasattr(experts, "local_experts"):
        for expert in experts.local_experts:
            _refuse_fused(expert)
        return [expert.linear_fc2 for expert in experts.local_experts]
    _refuse_fused(experts)
    return [experts.linear_fc2]


def _refuse_fused(mlp: nn.Module) -> None:
    """A fused MLP never calls its ``linear_fc2`` module, so no mask would be applied."""
    if getattr(mlp, "_with_fused_impl", False) or getattr(mlp, "use_fused_mlp", False):
        raise ValueError(
            f"{type(mlp).__name__} runs a fused kernel that bypasses linear_fc2; build the model with "
            "use_transformer_engine_op_fuser=False to make it elastic"
        )
