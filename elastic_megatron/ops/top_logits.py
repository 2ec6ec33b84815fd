"""The most probable entries of a model's vocabulary, from its hidden states and chunk by chunk."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..cost.loss_memory import chunk_of
from .chunked_kd import Projection
from .kd import place_in_part
from .parallel import group_size
from .top_block import TopLogits, highest, take_out


@torch.no_grad()
def top_logits(
    model: Projection,
    k: int,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk: int | None = None,
) -> TopLogits:
    """The ``k`` most probable entries of the whole vocabulary of every token, and what is left to all others.

    Args:
        k: at most the size of the vocabulary.
        temperature: of the softmax whose log-probabilities they get.
        group: the tensor-parallel ranks that share the vocabulary; each returns the same.
        chunk: tokens whose logits exist at a time; default: ``cost.loss_memory.chunk_of``.
    """
    hidden, weight = model.rows()
    assert 0 < k <= len(weight) * group_size(group)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    found = []
    for part in hidden.split(chunk or chunk_of(hidden.shape[-1])):
        # in the model's type first, as the output layer makes them
        found.append(_of_chunk((part @ weight.t()).to(wide).div_(temperature), k, group))
    leading = model.hidden.shape[:-1]
    ids, log_p = (torch.cat(parts).view(*leading, -1) for parts in zip(*found, strict=True))
    return TopLogits(ids, log_p)


def _of_chunk(logits: Tensor, k: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Ids [c, k] and log-probabilities [c, k + 1] of this rank's logits [c, V]; these are overwritten."""
    part = logits.shape[-1]
    tops, ids = logits.topk(min(k, part), dim=-1)
    if group is not None and group_size(group) > 1:
        ids = _gathered(ids + group.rank() * part, group)
        tops, order = _gathered(tops, group).topk(k, dim=-1)
        ids = ids.gather(1, order)
    take_out(logits, place_in_part(ids, part, group))
    peak = highest(logits, group)
    rest = logits.sub_(peak).exp_().sum(-1, keepdim=True)
    if group_size(group) > 1:
        dist.all_reduce(rest, group=group)
    return ids, torch.cat([tops, peak + rest.log()], -1).log_softmax(-1)


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' columns beside each other."""
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, -1)
