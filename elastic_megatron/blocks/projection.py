"""Hidden states of a model before its output layer, for losses that make logits of them chunk by chunk."""

from __future__ import annotations

from typing import Any

from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from ..ops.chunked_kd import Projection


def projection(model: Any, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Projection:
    """Run the last pipeline chunk of a ``HybridModel`` up to its output layer, and hand out that layer's weight.

    Hidden states [b, s, channels] are those of every token of the context-parallel rank, also under sequence
    parallelism, and their gradient is summed over tensor ranks. Tied embeddings give the weight that they share.

    The output layer is called with another ``forward`` for this one time: hooks that run before it do run, as
    Megatron's that waits for its parameters.
    """
    head, weights = model.output_layer, []
    assert not head._forward_hooks, "a hook on the output layer would be given hidden states for logits"
    assert not _rounds(head), (
        "the output layer is quantised, and its logits are not made here as it makes them"
    )

    def hand_over(
        hidden: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        weights.append(head.weight if weight is None else weight)
        if head.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, group=head.tp_group), None
        return copy_to_tensor_model_parallel_region(hidden, group=head.tp_group), None

    head.__dict__["forward"] = hand_over  # looked up before the class's
    try:
        hidden = model(tokens, position_ids, attention_mask)
    finally:
        del head.__dict__["forward"]
    return Projection(hidden, weights[0])


def _rounds(head: Any) -> bool:
    """Whether ModelOpt's quantisers do anything to a layer."""
    quantisers = (getattr(head, f"{name}_quantizer", None) for name in ("input", "weight", "output"))
    return any(q is not None and q.is_enabled for q in quantisers)
