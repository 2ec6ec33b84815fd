"""The calibration pass: run a model over data, return the ranking of its components."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..space import AXIS_NAMES, ParentShape
from .depth import Batch, depth_ranking
from .ranking import Ranking, order_of
from .sites import watching
from .sums import Reduce, Sums, scores_of


def identity(x: Tensor) -> Tensor:
    """The reduction of a single rank."""
    return x


def collect(
    model: nn.Module,
    parent: ParentShape,
    batches: Iterable[Batch],
    *,
    axes: Sequence[str],
    head_dim_kept: int | None = None,
    depth_batches: int = 1,
    depth_iterative: bool = True,
    reduce: Reduce = identity,
) -> Ranking:
    """Score every component of ``axes`` in one forward pass per batch, and order them.

    Args:
        model: a ``HybridModel``, stock or elastic (outside ``running``), whole on this rank, perhaps wrapped.
        parent: its shape.
        batches: ``tokens`` [batch, sequence] int64, optionally ``position_ids`` and ``attention_mask``. Every
            token counts: batches must not be padded.
        axes: which axes to rank.
        head_dim_kept: channels over which Mamba heads are scored (``mamba_head_score``).
        depth_batches: how many of the first batches rank ``num_layers``.
        depth_iterative: see ``depth_ranking``.
        reduce: sums a tensor over the ranks that saw other tokens; applied to raw sums and counts only, in
            the same order on every rank.

    Raises:
        UserError: an axis that the model lacks, a model that is sharded, no data, activations that are not
            finite, or a fused kernel that hides them.
    """
    _check(model, parent, axes)
    widths = tuple(a for a in AXIS_NAMES if a in axes and a != "num_layers")
    depth = "num_layers" in axes
    device = next(model.parameters()).device
    decoder, sums, data = _decoder(model), Sums(parent, widths, device), _Data(device)
    first: list[Batch] = []

    def logits(batch: Batch) -> Tensor:
        tokens = batch["tokens"]
        positions = batch.get("position_ids")
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return model(tokens, positions, batch.get("attention_mask"))

    with torch.no_grad(), _evaluating(model):
        with watching(decoder, parent, widths, sums):
            for batch in batches if widths else islice(batches, depth_batches):
                data.add(batch["tokens"])
                if depth and len(first) < depth_batches:
                    first.append(batch)
                if widths:
                    logits(batch)
        count, digest = data.finish(reduce)
        raw = {key: value.cpu() for key, value in sums.reduced(reduce).items()}
        scores = scores_of(raw, parent, widths, head_dim_kept)
        orders = {key: order_of(score, parent.groups(_axis(key))) for key, score in scores.items()}
        if depth:
            scores["num_layers"], order = depth_ranking(
                logits, decoder, first, iterative=depth_iterative, reduce=reduce
            )
            orders["num_layers"] = torch.tensor(order)
    _check_finite(scores)
    tokens = {
        i: raw[key].long()
        for i in parent.layers_of("E")
        if (key := f"layers.{i}.expert_tokens") in raw
    }  # fmt: skip
    return Ranking(scores, orders, tokens, parent.hybrid_layer_pattern, count, digest, _versions())


class _Data:
    """Counts and fingerprints tokens; both add up over batches and ranks, in any order of the sequences."""

    def __init__(self, device: torch.device) -> None:
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.words = torch.zeros(8, dtype=torch.int64, device=device)

    def add(self, tokens: Tensor) -> None:
        self.count += tokens.numel()
        for row in tokens.to("cpu", torch.int64).numpy():
            words = torch.frombuffer(bytearray(hashlib.sha256(row.tobytes()).digest()), dtype=torch.int32)
            self.words += words.to(self.words)

    def finish(self, reduce: Reduce) -> tuple[int, str]:
        """Number of tokens, and the digest. Raises ``UserError`` where there was no data."""
        count = int(reduce(self.count))
        if not count:
            raise UserError("no calibration data: the data set is empty; set rank.samples and check data")
        words = reduce(self.words).cpu().numpy()
        return count, hashlib.sha256(words.tobytes()).hexdigest()


def _decoder(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model.decoder


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no auxiliary losses, no bias updates; afterwards every module is as before."""
    before = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _axis(key: str) -> str:
    return key.rpartition(".")[2]


def _check(model: nn.Module, parent: ParentShape, axes: Sequence[str]) -> None:
    for a in axes:
        if a not in AXIS_NAMES:
            raise UserError(f"cannot rank {a!r}; known axes: {', '.join(AXIS_NAMES)}")
        if not parent.size(a):
            raise UserError(f"cannot rank {a}: {parent.hybrid_layer_pattern!r} has no such layer")
    config = _decoder(model).config
    sharded = {
        "tensor": config.tensor_model_parallel_size,
        "expert": config.expert_model_parallel_size,
        "pipeline": config.pipeline_model_parallel_size,
        "context": config.context_parallel_size,
    }
    if wrong := [f"parallel.{k}={v}" for k, v in sharded.items() if v > 1]:
        raise UserError(f"ranking needs the whole model on every rank, but {wrong[0]}; set it to 1")


def _check_finite(scores: Mapping[str, Tensor]) -> None:
    for key, score in scores.items():
        if score.isnan().any() or score.isposinf().any():
            raise UserError(
                f"scores of {key} are not finite: the model overflows on this data; check the checkpoint and "
                "its data type"
            )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("elastic-megatron", "megatron-core", "torch")}
