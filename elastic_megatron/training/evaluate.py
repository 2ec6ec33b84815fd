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
def token_loss(model: nn.Module, windows: Sequence[Tensor], batch_size: int = 16) -> tuple[float, int]:
    """(mean cross-entropy in nats per token, tokens scored) over windows of token ids.

    Positions 2..n of each window are scored, given those before them in the same window.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    for start in range(0, len(windows), batch_size):
        group = windows[start : start + batch_size]
        for length in sorted({len(w) for w in group}, reverse=True):
            ids = torch.stack([w for w in group if len(w) == length]).to(device)
            positions = torch.arange(length, device=device).expand(len(ids), -1)
            logits = model(ids, positions, None)[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
            total += loss.double().cpu()
            count += ids[:, 1:].numel()
    model.train(was_training)
    return float(total) / count, count


def evaluate(
    model: nn.Module,
    space: ElasticSpace | None,
    submodels: Mapping[str, SubmodelSpec],
    windows: Sequence[Tensor],
) -> dict[str, dict[str, Any]]:
    """Loss of every submodel, ``{name: {"loss", "tokens"}}``; a model that is not elastic is ``parent``."""
    if space is None:
        loss, count = token_loss(model, windows)
        return {"parent": {"loss": loss, "tokens": count}}
    out = {}
    device = next(model.parameters()).device
    for name, spec in submodels.items():
        mix = None if spec == space.full() else SubmodelMix.one_hot(space, spec, device)
        with running(model, mix) if mix is not None else nullcontext():
            loss, count = token_loss(model, windows)
        out[name] = {"loss": loss, "tokens": count}
    return out
