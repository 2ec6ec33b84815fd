"""Where the activations are: hooks on the modules of a Megatron ``HybridModel``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import UserError
from ..space import BLOCKS, ParentShape, axis
from .reap import expert_sums
from .scores import abs_sum, mamba_channels, mamba_states, query_heads, rms_norm
from .sums import Sums

Watch = Callable[[nn.Module, tuple[Any, ...], Any], None]


@contextmanager
def watching(decoder: Any, parent: ParentShape, axes: Collection[str], sums: Sums) -> Iterator[None]:
    """Forward passes of ``decoder`` inside this context add to ``sums``.

    Hooks see module outputs only and change none, so the model computes what it computes without them.
    Raises ``UserError`` where a fused kernel hides the activations of a layer.
    """
    handles = [
        module.register_forward_hook(hook) for module, hook in _sites(decoder, parent, frozenset(axes), sums)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sites(
    decoder: Any, parent: ParentShape, axes: frozenset[str], sums: Sums
) -> Iterator[tuple[nn.Module, Watch]]:
    if "hidden_size" in axes:
        yield decoder.final_norm, _norm_output(sums)
    for i, (layer, symbol) in enumerate(zip(decoder.layers, parent.hybrid_layer_pattern, strict=True)):
        if "hidden_size" in axes:
            yield _input_norm(layer, symbol, sums)
        own = frozenset(a for a in axes if axis(a).symbol == symbol)
        yield from _LAYER_SITES[symbol](layer, f"layers.{i}.", own, parent, sums)


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _norm_output(sums: Sums) -> Watch:
    def watch(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        sums.add("hidden_size", abs_sum(_first(output)))

    return watch


def _input_norm(layer: Any, symbol: str, sums: Sums) -> tuple[nn.Module, Watch]:
    """The module that normalises a layer's input, found by the name of its weight in the fact table."""
    parameters = dict(layer.named_parameters())
    name = next(n for n in (BLOCKS[symbol][0].name, *BLOCKS[symbol][0].aliases) if n in parameters)
    owner, _, attribute = name.rpartition(".")
    module = layer.get_submodule(owner)
    if attribute == "weight":
        return module, _norm_output(sums)

    def fused(linear: Any, args: tuple[Any, ...], _: Any) -> None:
        weight, eps = linear.layer_norm_weight, layer.config.layernorm_epsilon
        if layer.config.layernorm_zero_centered_gamma:
            weight = weight + 1
        sums.add("hidden_size", abs_sum(rms_norm(args[0], weight, eps)))

    return module, fused


def _abs_output(sums: Sums, key: str, index: int | None = None) -> Watch:
    def watch(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        sums.add(key, abs_sum(_first(output)), index)

    return watch


def _mamba(
    layer: Any, prefix: str, axes: frozenset[str], parent: ParentShape, sums: Sums
) -> Iterator[tuple[nn.Module, Watch]]:
    heads, head_dim = parent.mamba_num_heads, parent.mamba_head_dim
    sizes = (heads * head_dim, parent.mamba_num_groups, parent.mamba_state_dim)
    mixer = layer.mixer

    def channels(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        sums.add(prefix + "mamba_channels", mamba_channels(_first(output), heads, head_dim))

    def states(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        conv = mixer.cp.get_conv1d_weight(), mixer.cp.get_conv1d_bias()
        sums.add(prefix + "mamba_states", mamba_states(_first(output), conv, sizes))

    if axes & {"mamba_num_heads", "mamba_head_dim"}:
        yield mixer.in_proj, channels
    if "mamba_state_dim" in axes:
        yield mixer.in_proj, states


def _attention(
    layer: Any, prefix: str, axes: frozenset[str], parent: ParentShape, sums: Sums
) -> Iterator[tuple[nn.Module, Watch]]:
    sizes = (parent.num_query_groups, parent.num_attention_heads, parent.kv_channels)

    def queries(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        sums.add(prefix + "query_heads", query_heads(_first(output), *sizes))

    if "num_attention_heads" in axes:
        yield layer.self_attention.linear_qkv, queries


def _dense(
    layer: Any, prefix: str, axes: frozenset[str], _: ParentShape, sums: Sums
) -> Iterator[tuple[nn.Module, Watch]]:
    if "ffn_hidden_size" in axes:
        _refuse_fused(layer.mlp)
        yield layer.mlp.linear_fc1, _abs_output(sums, prefix + "ffn_hidden_size")


def _experts(
    layer: Any, prefix: str, axes: frozenset[str], _: ParentShape, sums: Sums
) -> Iterator[tuple[nn.Module, Watch]]:
    experts, shared = layer.mlp.experts, "moe_shared_expert_intermediate_size"

    def outputs(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tokens = args[1]
        sums.add(prefix + "expert_outputs", expert_sums(_first(output), tokens))
        sums.add(prefix + "expert_tokens", tokens.to(output[0].device).double())

    if "num_moe_experts" in axes:
        if layer.config.moe_apply_probs_on_input:
            raise UserError(
                "moe_apply_probs_on_input weights what an expert reads, not what it writes, so experts cannot "
                "be ranked; unset it in the model's config"
            )
        yield experts, outputs
    if "moe_ffn_hidden_size" in axes:
        yield from _expert_channels(experts, prefix + "moe_ffn_hidden_size", sums)
    if shared in axes:
        _refuse_fused(layer.mlp.shared_experts)
        yield layer.mlp.shared_experts.linear_fc1, _abs_output(sums, prefix + shared)


def _expert_channels(experts: Any, key: str, sums: Sums) -> Iterator[tuple[nn.Module, Watch]]:
    """First projections of the routed experts: one module each, or one grouped GEMM for all."""
    if hasattr(experts, "local_experts"):
        for e, expert in enumerate(experts.local_experts):
            _refuse_fused(expert)
            yield expert.linear_fc1, _abs_output(sums, key, e)
        return
    _refuse_fused(experts)

    def grouped(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        splits = [int(n) for n in args[1]]
        for e, rows in enumerate(_first(output).split(splits)):
            sums.add(key, abs_sum(rows), e)

    yield experts.linear_fc1, grouped


def _refuse_fused(mlp: nn.Module) -> None:
    if getattr(mlp, "_with_fused_impl", False) or getattr(mlp, "use_fused_mlp", False):
        raise UserError(
            f"{type(mlp).__name__} runs a fused kernel that hides its activations; rank the model with "
            "use_transformer_engine_op_fuser=False"
        )


_LAYER_SITES = {"M": _mamba, "*": _attention, "-": _dense, "E": _experts}
