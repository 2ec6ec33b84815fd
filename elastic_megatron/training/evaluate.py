"""Loss of any submodel on held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import runtime
from ..blocks import forward_only
from ..blocks.forward import Batch
from ..ops.chunked_kd import Projection, chunked_token_losses
from ..ops.mix import SubmodelMix
from ..space import ElasticSpace, SubmodelSpec
from .distill import DistilledChunk


def token_losses(
    pairs: Sequence[DistilledChunk], windows: Sequence[Tensor], *, batch_size: int = 16
) -> dict[str, Any]:
    """``{"loss", "tokens"}``: mean cross-entropy in nats per token, and tokens scored, over windows of token ids.

    Positions 2..n of each window are scored, given those before them in the same window. Data-parallel ranks
    share the windows; every rank of the world returns the result of all.

    Args:
        pairs: this rank's pipeline chunks; with a teacher's beside them, ``"kl"`` is the mean KL(teacher || model).
    """
    groups = runtime.groups()
    device = next(pairs[0].parameters()).device
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
            on_device = [runtime.sent(batch, device) for batch in batches]
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
) -> dict[str, dict[str, Any]]:
    """``token_losses`` of every submodel, by name; a model that is not elastic is ``parent``.

    Args:
        chunks: this rank's pipeline chunks, bare, or in a ``DistilledChunk``: those that have ``submodels`` run them on
            their own widths.
        batch_size: windows of one forward pass on a rank.
    """
    pairs = [c if isinstance(c, DistilledChunk) else DistilledChunk(c) for c in chunks]
    was_training = pairs[0].module.training
    device = next(pairs[0].parameters()).device
    for pair in pairs:
        pair.module.eval()
    out = {}
    for name, spec in submodels.items() if space is not None else [("parent", None)]:
        with ExitStack() as stack:
            if space is not None and spec is not None and spec != space.full():
                mix = SubmodelMix.one_hot(space, spec, device)
                for pair in pairs:
                    stack.enter_context(one_size(pair, mix))
            out[name] = token_losses(pairs, windows, batch_size=batch_size)
    for pair in pairs:
        pair.module.train(was_training)
    return out


@contextmanager
def one_size(pair: DistilledChunk, mix: SubmodelMix) -> Iterator[None]:
    """Run a submodel with the weights of now, sliced where it can be, and leave no copies of them behind."""
    submodels = pair.submodels
    if submodels is not None:
        submodels.release()
    with pair.running(mix, sliced=True):
        yield
    if submodels is not None:
        submodels.release()
