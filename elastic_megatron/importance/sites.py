"""Where the activations are: hooks on the modules of a Megatron ``HybridModel``, and whose they are.

Tensor- and expert-parallel ranks see their own heads, channels and experts, data- and context-parallel ranks
their own tokens, and a pipeline stage its own layers: these all add, each at its own place. What several ranks
compute alike is added by the first of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops.parallel import zigzag_order
from ..space import BLOCKS, ParentShape, axis
from .reap import expert_sums
from .scores import abs_sum, mamba_channels, mamba_states, rms_norm, square_sum, wide
from .sums import Sums, Where

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

Watch = Callable[[nn.Module, tuple[Any, ...], Any], None]
Site = tuple[nn.Module, Watch]


@dataclass(frozen=True)
class _Layer:
    """A layer to watch: its module, the elastic axes it owns, and where its sums lie."""

    module: Any
    prefix: str
    axes: frozenset[str]
    parent: ParentShape
    sums: Sums
    groups: ProcessGroupCollection

    def add(self, key: str, value: Tensor, where: Where = ()) -> None:
        self.sums.add(self.prefix + key, value, where)


@contextmanager
def watching(model: Any, parent: ParentShape, axes: Collection[str], sums: Sums) -> Iterator[None]:
    """Forward passes of ``model``, a bare pipeline chunk, inside this context add to ``sums``.

    Hooks see module outputs only and change none, so the model computes what it computes without them.
    Raises ``UserError`` where a fused kernel hides the activations of a layer.
    """
    handles = [
        module.register_forward_hook(hook) for module, hook in _sites(model, parent, frozenset(axes), sums)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _sites(model: Any, parent: ParentShape, axes: frozenset[str], sums: Sums) -> Iterator[Site]:
    decoder, groups = model.decoder, model.pg_collection
    # the residual stream is the same on all tensor ranks unless they share the sequence
    own_stream = decoder.config.sequence_parallel or groups.tp.rank() == 0
    if "hidden_size" in axes and own_stream and decoder.post_process:
        yield decoder.final_norm, _norm_output(sums)
    for module in decoder.layers:
        number = module.layer_number - 1
        symbol = parent.hybrid_layer_pattern[number]
        if "hidden_size" in axes and own_stream:
            yield _input_norm(module, symbol, sums)
        own = frozenset(a for a in axes if axis(a).symbol == symbol)
        yield from _LAYER_SITES[symbol](_Layer(module, f"layers.{number}.", own, parent, sums, groups))


def _share(group: Any, size: int) -> slice:
    """This rank's part of ``size`` components that the ranks of a group share."""
    own = size // group.size()
    return slice(group.rank() * own, (group.rank() + 1) * own)


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


def _abs_output(layer: _Layer, key: str, where: Where) -> Watch:
    def watch(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        layer.add(key, abs_sum(_first(output)), where)

    return watch


def _mamba(layer: _Layer) -> Iterator[Site]:
    parent, tp, mixer = layer.parent, layer.groups.tp, layer.module.mixer
    heads, groups = _share(tp, parent.mamba_num_heads), _share(tp, parent.mamba_num_groups)
    local_heads, local_groups = heads.stop - heads.start, groups.stop - groups.start
    inner, width = local_heads * parent.mamba_head_dim, 2 * local_groups * parent.mamba_state_dim

    def channels(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        squares = mamba_channels(_first(output), local_heads, parent.mamba_head_dim)
        layer.add("mamba_channels", squares, (heads,))

    def states(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        bc = _whole_sequence(_first(output)[..., 2 * inner : 2 * inner + width], layer.groups.cp)
        if layer.groups.cp.rank() == 0:
            conv = mixer.conv1d_weight[inner:], mixer.conv1d_bias[inner:]
            squares = mamba_states(bc, *conv, local_groups)
            layer.add("mamba_states", squares, (slice(None), groups))

    if layer.axes & {"mamba_num_heads", "mamba_head_dim"}:
        yield mixer.in_proj, channels
    if "mamba_state_dim" in layer.axes:
        yield mixer.in_proj, states


def _whole_sequence(x: Tensor, group: Any) -> Tensor:
    """[sequence, ...] from the parts that context-parallel ranks hold of it, on each of them."""
    if group.size() == 1:
        return x
    parts = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    torch.distributed.all_gather_into_tensor(parts, x.contiguous(), group=group)
    whole = torch.empty_like(parts)
    whole[zigzag_order(len(parts), group.size()).to(x.device)] = parts
    return whole


def _attention(layer: _Layer) -> Iterator[Site]:
    # a tensor rank's rows are whole heads only where there are at least as many KV groups as ranks
    rows = (layer.parent.num_attention_heads + 2 * layer.parent.num_query_groups) * layer.parent.kv_channels
    own = _share(layer.groups.tp, rows)

    def queries(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        layer.add("qkv_rows", square_sum(_first(output)), (own,))

    if "num_attention_heads" in layer.axes:
        yield layer.module.self_attention.linear_qkv, queries


def _dense(layer: _Layer) -> Iterator[Site]:
    if "ffn_hidden_size" in layer.axes:
        yield _first_projection(layer, layer.module.mlp, "ffn_hidden_size")


def _experts(layer: _Layer) -> Iterator[Site]:
    mlp, shared = layer.module.mlp, "moe_shared_expert_intermediate_size"
    own = _share(layer.groups.ep, layer.parent.num_moe_experts)

    def outputs(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tokens = args[1]
        weighted = _summed(_first(output), layer.groups.expt_tp)
        if layer.groups.expt_tp.rank() == 0:
            layer.add("expert_outputs", expert_sums(weighted, tokens), (own,))
            layer.add("expert_tokens", tokens.to(weighted.device).double(), (own,))

    if "num_moe_experts" in layer.axes:
        if layer.module.config.moe_apply_probs_on_input:
            raise UserError(
                "moe_apply_probs_on_input weights what an expert reads, not what it writes, so experts cannot "
                "be ranked; unset it in the model's config"
            )
        yield mlp.experts, outputs
    if "moe_ffn_hidden_size" in layer.axes:
        yield from _expert_channels(layer, mlp.experts, own.start)
    if shared in layer.axes:
        yield _first_projection(layer, mlp.shared_experts, shared)


def _summed(x: Tensor, group: Any) -> Tensor:
    """The sum of the ranks' ``x``: with expert tensor parallelism each holds a part of every output."""
    if group.size() == 1:
        return x
    total = wide(x).clone()
    torch.distributed.all_reduce(total, group=group)
    return total


def _expert_channels(layer: _Layer, experts: Any, first: int) -> Iterator[Site]:
    """First projections of the routed experts: one module each, or one grouped GEMM for all."""
    key = "moe_ffn_hidden_size"
    own = _share(layer.groups.expt_tp, layer.parent.moe_ffn_hidden_size)
    if hasattr(experts, "local_experts"):
        for e, expert in enumerate(experts.local_experts):
            _refuse_fused(expert)
            yield expert.linear_fc1, _abs_output(layer, key, (first + e, own))
        return
    _refuse_fused(experts)

    def grouped(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        parts = _first(output).split([int(n) for n in args[1]])
        layer.add(
            key, torch.stack([abs_sum(rows) for rows in parts]), (slice(first, first + len(parts)), own)
        )

    yield experts.linear_fc1, grouped


def _first_projection(layer: _Layer, mlp: Any, key: str) -> Site:
    _refuse_fused(mlp)
    own = _share(layer.groups.tp, layer.parent.size(key))
    return mlp.linear_fc1, _abs_output(layer, key, (own,))


def _refuse_fused(mlp: nn.Module) -> None:
    if getattr(mlp, "_with_fused_impl", False) or getattr(mlp, "use_fused_mlp", False):
        raise UserError(
            f"{type(mlp).__name__} runs a fused kernel that hides its activations; rank the model with "
            "use_transformer_engine_op_fuser=False"
        )


_LAYER_SITES = {"M": _mamba, "*": _attention, "-": _dense, "E": _experts}
