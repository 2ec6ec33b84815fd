"""Step ``ranking``: every component scored, weights sorted, the function unchanged."""

from __future__ import annotations

import time

import torch

from elastic_megatron.training.rank import ROUNDING, rank
from gpu.bench import Bench
from gpu.models import parent, recipe, scale


def ranking(bench: Bench) -> None:
    """Scores are finite, orders are permutations, and logits after sorting are those before, to rounding."""
    parent(bench)
    if bench.rehearse:
        bench.stands_in("Megatron's own linears, and Mamba and attention in torch")
    samples = 4
    run = recipe(
        bench, "rank", steps=1, job="rank", rank={"samples": samples, "seq_length": scale(bench).length}
    )
    began = time.perf_counter()
    done = rank(run)
    bench.number("tokens per second, with loading and saving",
                 samples * scale(bench).length / (time.perf_counter() - began))  # fmt: skip
    bench.at_most("logits after sorting against before", done.logits_error, ROUNDING[run.model.dtype])
    scores, orders = done.ranking.scores, done.ranking.orders
    unsound = [n for n, t in scores.items() if bool(t.isnan().any())]
    bench.at_most("scores that are not numbers", len(unsound), 0)
    torn = [n for n, t in orders.items() if not _permutation(torch.as_tensor(t))]
    bench.at_most("orders that are no permutation", len(torn), 0)
    bench.number("components ranked", sum(torch.as_tensor(t).numel() for t in orders.values()))


def _permutation(order: torch.Tensor) -> bool:
    """Of the last dimension, in every row."""
    return torch.equal(order.sort(-1).values, torch.arange(order.shape[-1]).expand_as(order))
