"""Measure the importance pass beside a plain forward pass of the same batches by the same function.

OMP_NUM_THREADS=1 python tools/benchmarks/ranking.py [--rounds 7] [--json FILE]
python tools/benchmarks/ranking.py --table     # write the table of README.md from results/ranking_cpu.json

The pass is the whole of ``importance.collect``: it finds what to watch, runs the batches, sums in every layer, and
makes scores and orders of the sums. Ranking layers is left out: that is further forward passes by definition.

Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from elastic_megatron.blocks import build_model, forward_only
from elastic_megatron.importance import collect
from elastic_megatron.space import AXIS_NAMES, ParentShape

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import interleave  # noqa: E402
import machine  # noqa: E402
import ratios  # noqa: E402
from step_models import LARGE, SMALL  # noqa: E402

RESULTS = HERE / "results" / "ranking_cpu.json"
BLOCK = "ranking-table"
PLAIN = "forward"
BATCHES = 2

# contenders by title: the axes that they score
PASSES: Mapping[str, Sequence[str]] = {
    "REAP and the scores of all widths": [a for a in AXIS_NAMES if a != "num_layers"],
    "REAP alone": ["num_moe_experts"],
}
TARGETS = {"REAP and the scores of all widths": 1.10}


def main() -> int:
    return ratios.main(ratios.arguments(__doc__, RESULTS), measure, RESULTS, BLOCK)


def setting(device: torch.device) -> tuple[ParentShape, int, int]:
    """A model, and the sequences and tokens a sequence of a batch."""
    return (SMALL, 2, 1024) if device.type == "cpu" else (LARGE, 4, 4096)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as ``ratios`` describes results."""
    device = interleave.start()
    parent, rows, length = setting(device)
    times = interleave.race(contenders(parent, rows, length, device), args.rounds, ratios.say)
    return {
        "machine": machine.facts(HERE),
        "versions": machine.versions(),
        **interleave.describe(device),
        "rounds": args.rounds,
        "model": _sentence(parent, rows, length),
        "contenders": {name: {"seconds": interleave.spread(seconds)} for name, seconds in times.items()},
        "rows": [
            ratios.row(f"{title} / {PLAIN}", interleave.ratio(times, [title], [PLAIN]), TARGETS.get(title))
            for title in PASSES
        ],
        "growth": [],
    }


def contenders(
    parent: ParentShape, rows: int, length: int, device: torch.device
) -> dict[str, interleave.Step]:
    """The plain forward pass, and every pass of ``PASSES``, of one model over the same batches."""
    model = build_model(parent, dtype=interleave.dtype_of(device)).to(device).eval()
    generator = torch.Generator().manual_seed(7)
    batches = [
        {"tokens": torch.randint(parent.vocab_size, (rows, length), generator=generator).to(device)}
        for _ in range(BATCHES)
    ]

    def scored(axes: Sequence[str]) -> interleave.Step:
        return lambda: collect([model], parent, batches, axes=axes)

    return {
        PLAIN: lambda: forward_only([model], batches, lambda *_: None),
        **{title: scored(axes) for title, axes in PASSES.items()},
    }


def _sentence(parent: ParentShape, rows: int, length: int) -> str:
    return (
        f"Model: layers `{parent.hybrid_layer_pattern}`, hidden size {parent.hidden_size:,}, "
        f"{parent.num_moe_experts} experts of which {parent.moe_router_topk} run, vocabulary "
        f"{parent.vocab_size:,}; {BATCHES} batches of {rows} sequences of {length:,} tokens."
    )


if __name__ == "__main__":
    sys.exit(main())
