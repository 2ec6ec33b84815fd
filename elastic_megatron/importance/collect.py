"""The calibration pass: run a model over data, return the ranking of its components."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import forward_only
from ..blocks.forward import Batch
from ..errors import UserError
from ..space import AXIS_NAMES, ParentShape
from .depth import depth_ranking, runs
from .ranking import Ranking, order_of
from .sites import watching
from .sums import Sums, scores_of


def collect(
    chunks: Sequence[Any],
    parent: ParentShape,
    batches: Iterable[Batch],
    *,
    axes: Sequence[str],
    head_dim_kept: int | None = None,
    depth_batches: int = 1,
    depth_iterative: bool = True,
) -> Ranking:
    """Score every component of ``axes`` in one forward pass per batch, and order them; collective.

    The data set is what the data-parallel ranks hold, one rank's batches after the other's; of one data set
    every parallel layout makes the same ranking, on every rank, up to rounding of the model's activations.

    Args:
        chunks: this rank's pipeline chunks of a ``HybridModel``, bare, stock or elastic (outside ``running``).
        parent: the whole model's shape.
        batches: of this data-parallel rank; ``tokens`` [batch, sequence] int64, whole sequences. Every token
            counts: batches must not be padded. All data-parallel ranks have batches of the same shapes.
        axes: which axes to rank.
        head_dim_kept: channels over which Mamba heads are scored (``mamba_head_score``).
        depth_batches: how many of the data set's first batches rank ``num_layers``.
        depth_iterative: see ``depth_ranking``.

    Raises:
        UserError: an axis that the model lacks, no data, activations that are not finite, a fused kernel that
            hides them, a virtual pipeline, or experts that get every token from several tensor-parallel ranks.
    """
    _check(chunks, parent, axes)
    widths = tuple(a for a in AXIS_NAMES if a in axes and a != "num_layers")
    depth = "num_layers" in axes
    device, groups = next(chunks[0].parameters()).device, chunks[0].pg_collection
    # of the ranks that have the same batches, and without widths of those that read more than depth needs
    counted = not any(g.rank() for g in (groups.tp, groups.pp, groups.cp, *(() if widths else (groups.dp,))))
    sums, data = Sums(parent, widths, device), _Data(device, counted)
    with torch.no_grad(), _evaluating(chunks):
        used = batches if widths else islice(batches, depth_batches)
        first = _watched(chunks, parent, widths, used, sums, data, depth_batches)
        count, digest = data.finish()
        raw = sums.totals()
        scores = scores_of(raw, parent, widths, head_dim_kept)
        _check_finite(scores)  # before layers are left out one by one
        orders = {key: order_of(score, parent.groups(_axis(key))) for key, score in scores.items()}
        if depth:
            shared = _shared(first, groups.dp)
            scores["num_layers"], order = depth_ranking(
                chunks, shared, layers=parent.num_layers, iterative=depth_iterative
            )
            orders["num_layers"] = torch.tensor(order)
    _check_finite(scores)
    tokens = {
        i: raw[key].long()
        for i in parent.layers_of("E")
        if (key := f"layers.{i}.expert_tokens") in raw
    }  # fmt: skip
    return Ranking(scores, orders, tokens, parent.hybrid_layer_pattern, count, digest, _versions())


def _watched(
    chunks: Sequence[Any], parent: ParentShape, widths: Sequence[str], batches: Iterable[Batch], sums: Sums,
    data: _Data, keep: int,
) -> list[Batch]:  # fmt: skip
    """Add every batch to the sums and to the data's; returns the first ``keep`` of them."""
    kept: list[Batch] = []
    with ExitStack() as stack:
        for chunk in chunks:
            stack.enter_context(watching(chunk, parent, widths, sums))
        for run in runs(batches, 4 * chunks[0].pg_collection.pp.size()):
            for batch in run:
                data.add(batch["tokens"])
            kept += run[: keep - len(kept)]
            if widths:
                forward_only(chunks, run, lambda *_: None)
    return kept


def _shared(batches: Sequence[Batch], group: Any) -> list[Batch]:
    """The first data-parallel rank's batches, divided among all of them.

    Where the rows do not divide every rank runs all of them, because experts may need it to; errors relative to
    the logits do not change when both are counted several times.
    """
    whole = [batch["tokens"].clone() for batch in batches]
    for tokens in whole:
        torch.distributed.broadcast(tokens, group=group, group_src=0)
    if not any(len(tokens) % group.size() for tokens in whole):
        whole = [tokens.chunk(group.size())[group.rank()] for tokens in whole]
    return [{"tokens": tokens} for tokens in whole]


class _Data:
    """Counts and fingerprints tokens; both add up over batches and ranks, in any order of the sequences."""

    def __init__(self, device: torch.device, counted: bool) -> None:
        self.counted = counted
        # [number of tokens, digest of 8 words]
        self.sums = torch.zeros(9, dtype=torch.int64, device=device)

    def add(self, tokens: Tensor) -> None:
        if not self.counted:
            return
        self.sums[0] += tokens.numel()
        for row in tokens.to("cpu", torch.int64).numpy():
            words = torch.frombuffer(bytearray(hashlib.sha256(row.tobytes()).digest()), dtype=torch.int32)
            self.sums[1:] += words.to(self.sums)

    def finish(self) -> tuple[int, str]:
        """Number of tokens, and the digest; collective. Raises ``UserError`` where there was no data."""
        torch.distributed.all_reduce(self.sums)
        count, words = self.sums.cpu().split([1, 8])
        if not count:
            raise UserError("no calibration data: the data set is empty; set rank.samples and check data")
        return int(count), hashlib.sha256(words.numpy().tobytes()).hexdigest()


@contextmanager
def _evaluating(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """No dropout, no auxiliary losses, no bias updates; afterwards every module is as before."""
    before = {m: m.training for chunk in chunks for m in chunk.modules()}
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def _axis(key: str) -> str:
    return key.rpartition(".")[2]


def _check(chunks: Sequence[Any], parent: ParentShape, axes: Sequence[str]) -> None:
    for a in axes:
        if a not in AXIS_NAMES:
            raise UserError(f"cannot rank {a!r}; known axes: {', '.join(AXIS_NAMES)}")
        if not parent.size(a):
            raise UserError(f"cannot rank {a}: {parent.hybrid_layer_pattern!r} has no such layer")
    if len(chunks) > 1:
        raise UserError(
            "ranking runs whole pipeline stages, but parallel.virtual_pipeline cuts them; rank the parent in a job "
            "without it first"
        )
    tensor, sequence = chunks[0].config.tensor_model_parallel_size, chunks[0].config.sequence_parallel
    if parent.num_moe_experts and tensor > 1 and not sequence:
        raise UserError(
            f"parallel.tensor={tensor} without parallel.sequence sends every token to the experts {tensor} times; "
            "set parallel.sequence: true"
        )


def _check_finite(scores: Mapping[str, Tensor]) -> None:
    for key, score in scores.items():
        if score.isnan().any() or score.isposinf().any():
            raise UserError(
                f"scores of {key} are not finite: the model overflows on this data; check the checkpoint and "
                "its data type"
            )


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("elastic-megatron", "megatron-core", "torch")}
