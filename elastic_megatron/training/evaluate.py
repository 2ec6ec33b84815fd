"""Loss of any submodel on held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .. import runtime
from ..blocks import forward_only, running
from ..blocks.forward import Batch
from ..ops.chunked_kd import Projection, chunked_token_losses
from ..ops.mix import SubmodelMix
from ..space import ElasticSpace, SubmodelSpec
from .distill import DistilledChunk


def token_losses(
    chunks: Sequence[nn.Module], windows: Sequence[Tensor], *, batch_size: int = 16
) -> dict[str, Any]:
    """``{"loss", "tokens"}``: mean cross-entropy in nats per token, and tokens scored, over windows of token ids.

    Positions 2..n of each window are scored, given those before them in the same window. Data-parallel ranks
    share the windows; every rank of the world returns the result of all.

    Args:
        chunks: bare, or each with a teacher's (``DistilledChunk``): then ``"kl"`` is the mean KL(teacher || model).
    """
    groups = runtime.groups()
    device = next(chunks[0].parameters()).device
    pairs = [c if isinstance(c, DistilledChunk) else DistilledChunk(c) for c in chunks]
    paired = any(pair.teacher is not None for pair in pairs)
    sums = torch.zeros(3, dtype=torch.float64, device=device)

    def consume(batch: Batch, output: tuple[Projection, Projection | None]) -> Tensor:
        found = chunked_token_losses(
            *output, batch["labels"], kind="forward_kl", temperature=1.0, ce_weight=1.0, group=groups.tp
        )
        of_scored = [(loss * batch["scored"]).double().sum() for loss in found if loss is not None]
        return torch.stack([batch["scored"].double().sum(), *of_scored])

    for length in sorted({len(w) for w in windows}, reverse=True):
        equal = [w for w in windows if len(w) == length]
        for batches in _batches(equal, batch_size, groups.dp.rank(), groups.dp.size()):
            on_device = [{k: v.to(device) for k, v in batch.items()} for batch in batches]
            for found in forward_only(pairs, on_device, consume):
                sums[: len(found)] += found
    if groups.tp.rank():
        sums.zero_()  # tensor ranks have the same numbers
    torch.distributed.all_reduce(sums)
    count, loss, kl = sums.tolist()
    return {"loss": loss / count, "tokens": int(count), **({"kl": kl / count} if paired else {})}


def _batches(
    windows: Sequence[Tensor], batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[list[dict[str, Tensor]]]:
    """This rank's batches of equal windows, in lists of one batch size.

    Ranks run equally many, in multiples of the pipeline's size: a batch that fills up scores nothing.
    """
    whole, rest = divmod(len(windows), batch_size)
    stages = runtime.groups().pp.size()
    for size, first, count in ((batch_size, 0, whole), (rest, whole * batch_size, 1 if rest else 0)):
        rounds = -(-count // (dp_size * stages)) * stages
        out = []
        for index in range(dp_rank, rounds * dp_size, dp_size):
            start = first + (index % max(count, 1)) * size
            tokens = torch.stack([windows[i] for i in range(start, start + size)])
            scored = torch.ones_like(tokens)
            scored[:, -1] = 0
            out.append({
                "tokens": tokens,
                "labels": tokens.roll(-1, 1),
                "scored": scored if index < count else torch.zeros_like(tokens),
            })  # fmt: skip
        yield out


def evaluate(
    chunks: Sequence[nn.Module],
    space: ElasticSpace | None,
    submodels: Mapping[str, SubmodelSpec],
    windows: Sequence[Tensor],
    *,
    batch_size: int = 16,
    paired: Sequence[nn.Module] = (),
) -> dict[str, dict[str, Any]]:
    """``token_losses`` of every submodel, by name; a model that is not elastic is ``parent``.

    Args:
        chunks: this rank's pipeline chunks, bare.
        batch_size: windows of one forward pass on a rank.
        paired: the same chunks, each with a teacher's.
    """
    was_training = chunks[0].training
    device = next(chunks[0].parameters()).device
    for chunk in chunks:
        chunk.eval()
    out = {}
    for name, spec in submodels.items() if space is not None else [("parent", None)]:
        with ExitStack() as stack:
            if space is not None and spec is not None and spec != space.full():
                mix = SubmodelMix.one_hot(space, spec, device)
                for chunk in chunks:
                    stack.enter_context(running(chunk, mix))
            out[name] = token_losses(paired or chunks, windows, batch_size=batch_size)
    for chunk in chunks:
        chunk.train(was_training)
    return out
