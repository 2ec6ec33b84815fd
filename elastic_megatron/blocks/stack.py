"""The hybrid stack that runs any submodel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.utils import WrappedTensor
from torch import Tensor, nn

from ..ops.mix import SubmodelMix
from ..space import ElasticSpace
from .binding import Binding, attach, stream_norm_scale
from .widths import LayerWidths, Shard, end_widths, layer_widths


class ElasticHybridStack(HybridStack):
    """``HybridStack`` over stock layers whose leaves carry the hooks of ``binding``.

    A forward pass runs the mix handed over by ``running``; without one it is the parent. The mix belongs to
    the micro-batch: it is read once, at the start of ``forward``, and with full recomputation its tensors
    are arguments of every checkpoint, so that several micro-batches with different budgets can be in flight.

    Raises ``ValueError`` for configurations whose recomputation would run outside the binding.
    """

    def __init__(self, config: Any, *args: Any, space: ElasticSpace, pp_layer_offset: int = 0, **kwargs: Any):
        super().__init__(config, *args, pp_layer_offset=pp_layer_offset, **kwargs)
        _refuse(config)
        self.space = space
        groups = kwargs["pg_collection"]
        self.shards = [Shard(g.rank(), g.size()) for g in (groups.tp, groups.expt_tp)]
        replicas = 1 if config.sequence_parallel else groups.tp.size()
        self.bindings = [
            attach(layer, symbol, space, replicas)
            for layer, symbol in zip(self.layers, self.layer_type_list, strict=True)
        ]
        # what acts on the residual stream outside the layers: the embedding's mask, the final norm
        self.ends = Binding(replicas)
        if self.post_process and self.post_layer_norm:
            stream_norm_scale(self.final_norm, self.ends)
        self._mix: SubmodelMix | None = None

    @contextmanager
    def running(self, mix: SubmodelMix | None) -> Iterator[None]:
        """Forward passes inside this context run ``mix``."""
        before, self._mix = self._mix, mix
        try:
            yield
        finally:
            self._mix = before

    def forward(self, hidden_states: Any, attention_mask: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """[s, b, hidden_size] in and out, as ``HybridStack.forward``."""
        mix = self._mix
        if mix is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        if isinstance(hidden_states, WrappedTensor):
            hidden_states = hidden_states.unwrap()
        with ExitStack() as stack:
            stack.enter_context(self.ends.bound(end_widths(mix)))
            mask = self.ends.get_shared("write")
            if self.pre_process and mask is not None:
                hidden_states = hidden_states * mask.to(hidden_states.dtype)
            if self.config.recompute_granularity == "full" and self.training:
                return self._recomputed(mix, hidden_states, attention_mask, **kwargs)
            for i, binding in enumerate(self.bindings):
                stack.enter_context(binding.bound(self._widths(mix, i)))
            return super().forward(hidden_states, attention_mask, *args, **kwargs)

    def _widths(self, mix: SubmodelMix, layer: int) -> LayerWidths:
        module: Any = self.layers[layer]
        return layer_widths(mix, module.layer_number - 1, *self.shards)

    def _recomputed(self, mix: SubmodelMix, hidden_states: Any, attention_mask: Tensor | None,
                    rotary_pos_emb: Tensor | None = None, packed_seq_params: Any = None,
                    padding_mask: Tensor | None = None, inference_context: Any = None) -> Any:  # fmt: skip
        """Full recomputation with the mix among the checkpoint's arguments (``recompute_method`` as stock)."""
        assert inference_context is None
        if not self.pre_process:
            hidden_states = self.input_tensor
        tensors = mix.tensors()

        def run(start: int, end: int) -> Any:
            def forward(hidden: Tensor, *mix_tensors: Tensor) -> Tensor:
                local = mix.with_tensors(mix_tensors)
                for i in range(start, end):
                    with self.bindings[i].bound(self._widths(local, i)):
                        out = self.layers[i](
                            hidden_states=hidden,
                            attention_mask=attention_mask,
                            rotary_pos_emb=rotary_pos_emb,
                            packed_seq_params=packed_seq_params,
                            **({"padding_mask": padding_mask} if self.layer_type_list[i] != "M" else {}),
                        )
                    hidden = out[0] if isinstance(out, tuple) else out
                return hidden

            return forward

        count, block = len(self.layers), self.config.recompute_method == "block"
        layers_each = self.config.recompute_num_layers or 1
        step = 1 if block else layers_each
        for start in range(0, count, step):
            end = min(start + step, count)
            if block and start >= layers_each:
                hidden_states = run(start, end)(hidden_states, *tensors)
            else:
                hidden_states = tensor_parallel.checkpoint(
                    run(start, end), self.config.distribute_saved_activations, hidden_states, *tensors
                )
        if self.post_process and self.post_layer_norm:
            hidden_states = self.final_norm(hidden_states)
        return hidden_states


def elastic_stack(model: Any) -> ElasticHybridStack:
    """The elastic stack of a model, through DDP and precision wrappers."""
    while hasattr(model, "module"):
        model = model.module
    stack = getattr(model, "decoder", None)
    if not isinstance(stack, ElasticHybridStack):
        raise ValueError(f"{type(model).__name__} was not built from elastic_hybrid_stack_spec")
    return stack


def running(model: nn.Module, mix: SubmodelMix | None) -> Any:
    """Context in which forward passes of ``model`` run ``mix`` (``None``: the parent)."""
    return elastic_stack(model).running(mix)


def _refuse(config: Any) -> None:
    outside = set(config.recompute_modules or ()) - {"core_attn"}
    if config.recompute_granularity == "selective" and outside:
        raise ValueError(
            f"recompute_modules={sorted(outside)} recompute parts of a layer after its widths are gone; use "
            "recompute_granularity='full' (or only 'core_attn') for elastic models"
        )
    if config.fp8 or config.fp4:
        raise ValueError("elastic training quantises through ModelOpt; unset TransformerConfig.fp8 and fp4")
    if config.mtp_num_layers:
        raise ValueError("multi-token-prediction layers are not elastic yet; build with mtp_num_layers=None")
    if config.moe_latent_size:
        raise ValueError("latent MoE projections are not elastic yet; build with moe_latent_size=None")
