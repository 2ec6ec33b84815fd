"""Forward passes without gradients under any parallel layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import runtime
from ..ops.parallel import zigzag

Batch = Mapping[str, Tensor]


@torch.no_grad()
def forward_only[T](
    chunks: Sequence[nn.Module], batches: Sequence[Batch], consume: Callable[[Batch, Any], T]
) -> list[T]:
    """Run batches of one shape through the model, by Megatron's own schedule.

    Args:
        chunks: this rank's pipeline chunks, bare, or in what returns something else on the last stage.
        batches: ``tokens`` [b, s], optionally ``position_ids`` and others of that shape: whole sequences. Every
            rank of a model replica passes the same ones; with a virtual pipeline their number is a multiple
            of the pipeline's size.
        consume: called on the last pipeline stage with a batch, cut for context parallelism, and what the chunk
            returned: of a bare one logits [b, s / context, vocabulary / tensor].

    Returns:
        What ``consume`` returned, in order; empty on the other stages.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    if not batches:
        return []
    context = runtime.groups().cp
    b, s = batches[0]["tokens"].shape

    def cut(batch: Batch) -> Batch:
        positions = torch.arange(s, device=batch["tokens"].device).expand(b, -1)
        whole = {"position_ids": positions, **batch}
        return {k: zigzag(v, 1, context.rank(), context.size()) for k, v in whole.items()}

    def step(iterator: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Callable[..., T]]:
        batch = next(iterator)
        output = model(batch["tokens"], batch["position_ids"], None)
        # schedules want one tensor, if only to see where it lies
        sent = output if isinstance(output, Tensor) else batch["tokens"]
        return sent, lambda _, non_loss_data: consume(batch, output)

    local = [cut(batch) for batch in batches]
    several = len(chunks) > 1
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(local) for _ in chunks] if several else iter(local),
        model=list(chunks) if several else chunks[0],
        num_microbatches=len(local),
        seq_length=s,
        micro_batch_size=b,
        decoder_seq_length=s,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return results
