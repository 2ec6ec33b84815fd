"""Loss of any submodel on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import running
from ..ops.mix import SubmodelMix
from ..space import ElasticSpace, SubmodelSpec


@torch.no_grad()
def token_loss(
    model: nn.Module, windows: Sequence[Tensor], *, group: Any = None, batch_size: int = 16
) -> tuple[float, int]:
    """(mean cross-entropy in nats per token, tokens scored) over windows of token ids.

    Positions 2..n of each window are scored, given those before them in the same window. With a process
    ``group`` its ranks share the windows, and each returns the result of all.
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    if group is not None:
        windows = windows[group.rank() :: group.size()]
    was_training = model.training
    model.eval()
    for start in range(0, len(windows), batch_size):
        chunk = windows[start : start + batch_size]
        for length in sorted({len(w) for w in chunk}, reverse=True):
            ids = torch.stack([w for w in chunk if len(w) == length]).to(device)
            positions = torch.arange(length, device=device).expand(len(ids), -1)
            logits = model(ids, positions, None)[:, :-1]
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
            )
            sums += torch.stack([loss.double(), loss.new_tensor(ids[:, 1:].numel()).double()])
    model.train(was_training)
    if group is not None:
        torch.distributed.all_reduce(sums, group=group)
    total, count = sums.tolist()
    return total / count, int(count)


def evaluate(
    model: nn.Module,
    space: ElasticSpace | None,
    submodels: Mapping[str, SubmodelSpec],
    windows: Sequence[Tensor],
    *,
    group: Any = None,
) -> dict[str, dict[str, Any]]:
    """Loss of every submodel, ``{name: {"loss", "tokens"}}``; a model that is not elastic is ``parent``.

    ``group`` as in ``token_loss``.
    """
    if space is None:
        loss, count = token_loss(model, windows, group=group)
        return {"parent": {"loss": loss, "tokens": count}}
    out = {}
    device = next(model.parameters()).device
    for name, spec in submodels.items():
        mix = None if spec == space.full() else SubmodelMix.one_hot(space, spec, device)
        with running(model, mix) if mix is not None else nullcontext():
            loss, count = token_loss(model, windows, group=group)
        out[name] = {"loss": loss, "tokens": count}
    return out
