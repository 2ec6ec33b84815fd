"""Measure training steps side by side: masked submodels against stock Megatron models, in time and peak memory.

OMP_NUM_THREADS=1 python tools/benchmarks/steps.py [--rounds 7] [--json FILE]
python tools/benchmarks/steps.py --table     # write the tables of README.md from results/steps_cpu.json

Exits with 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from elastic_megatron.cost import account, sizes_of_parent
from elastic_megatron.cost.account import flops_per_token

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import interleave  # noqa: E402
import machine  # noqa: E402
import ratios  # noqa: E402
from step_models import BUDGETS, CONTENDERS, LARGE, SMALL, Setting, Steps, flops  # noqa: E402

RESULTS = HERE / "results" / "steps_cpu.json"
BLOCK = "step-table"


@dataclass(frozen=True)
class Comparison:
    """Mean time of the contenders ``over`` by that of ``under``; memory is compared where it has a target.

    ``few``: on few tokens, where one of them takes too long otherwise; a matter of CPUs.
    """

    title: str
    over: tuple[str, ...]
    under: tuple[str, ...]
    target: float | None = None
    memory_target: float | None = None
    few: bool = False


def _all(way: str) -> tuple[str, ...]:
    return tuple(f"{way}, {budget}" for budget in BUDGETS)


COMPARISONS = (
    Comparison("sliced small / extracted small", ("sliced, small",), ("extracted, small",), 1.10),
    Comparison("sliced small / masked small", ("sliced, small",), ("masked, small",), 0.60),
    Comparison(
        "sliced small, the router learning / extracted small",
        ("sliced learning, small",),
        ("extracted, small",),
    ),
    Comparison("sliced full / stock", ("sliced, full",), ("stock",), 1.03),
    Comparison("sliced / masked, mean of the three budgets", _all("sliced"), _all("masked"), 0.80),
    Comparison("masked soft / stock", ("masked, soft",), ("stock",), 1.12, 1.05),
    Comparison("masked small / stock", ("masked, small",), ("stock",), 1.12, 1.05),
    Comparison("masked decided / masked soft", ("masked, decided",), ("masked, soft",), 1.05),
    Comparison(
        "masked decided, denormal numbers kept / flushed",
        ("masked, decided, denormal",),
        ("masked, decided",),
        few=True,
    ),
    Comparison("extracted small / stock", ("extracted, small",), ("stock",)),
)


def main() -> int:
    parser = ratios.arguments(__doc__, RESULTS)
    parser.add_argument(
        "--no-growth", dest="growth", action="store_false", help="leave the growth of cost out"
    )
    parser.add_argument(
        "--peak-tflops",
        type=float,
        metavar="N",
        help="of the device: the table then has the share of it in use",
    )
    parser.add_argument("--peak", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak is not None:
        print(json.dumps(_peak(args.peak)))
        return 0
    return ratios.main(parser, measure, RESULTS, BLOCK)


def setting(device: torch.device) -> Setting:
    """The comparisons': a step of one to three seconds on one thread of a CPU."""
    if device.type == "cpu":
        return Setting(SMALL, 2, 512, device)
    return Setting(LARGE, 2, 4096, device)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything, as ``ratios`` describes results."""
    device = interleave.start()
    at, few = setting(device), Setting(SMALL, 1, 32, device)
    compared = [c for c in COMPARISONS if device.type == "cpu" or not c.few]
    step_flops = 3 * at.tokens * flops_per_token(sizes_of_parent(at.parent), at.length)
    weighed = _names(c for c in compared if c.memory_target is not None)
    memory = {n: interleave.peak_of(Path(__file__), [n]) for n in weighed}
    times = _race(_names(c for c in compared if not c.few), at, args.rounds)
    short = _race(_names(c for c in compared if c.few), few, args.rounds)
    return {
        "machine": machine.facts(HERE),
        "versions": machine.versions(),
        **interleave.describe(device),
        "rounds": args.rounds,
        "model": _sentence(at),
        "peak_tflops": args.peak_tflops,
        "contenders": {
            n: {
                "seconds": interleave.spread(times[n]),
                "tokens": at.tokens,
                "flops": _share(n, at) * step_flops,
                "peak_bytes": memory.get(n),
            }
            for n in times
        },
        "rows": [_row(c, short if c.few else times, memory, at) for c in compared],
        "growth": _growth(args.rounds, device) if args.growth else [],
    }


def _names(comparisons: Iterable[Comparison]) -> list[str]:
    """Of their contenders, each once."""
    return list(dict.fromkeys(n for c in comparisons for n in (*c.under, *c.over)))


def _race(names: Sequence[str], at: Setting, rounds: int) -> dict[str, list[float]]:
    steps = Steps(at)
    return interleave.race({n: CONTENDERS[n](steps) for n in names}, rounds, ratios.say) if names else {}


def _share(name: str, at: Setting) -> float:
    """FLOPs of the submodel that a contender is a step of, by those of the parent."""
    budget = name.split(", ")[-1]
    return flops(at.space, budget, at.length) if budget in BUDGETS else 1.0


def _row(c: Comparison, times: interleave.Times, memory: dict[str, int], at: Setting) -> dict[str, Any]:
    peaks = [sum(memory[n] for n in names) / len(names) for names in (c.over, c.under) if c.memory_target]
    return ratios.row(
        c.title,
        interleave.ratio(times, c.over, c.under),
        c.target,
        memory=peaks[0] / peaks[1] if peaks else None,
        memory_target=c.memory_target,
        note=_note(c, at),
    )


def _note(c: Comparison, at: Setting) -> str | None:
    """The ratio of FLOPs that are computed; a masked step computes the parent's."""
    shares = [
        sum(1.0 if n.startswith("masked") else _share(n, at) for n in names) / len(names)
        for names in (c.over, c.under)
    ]
    return f"FLOPs {shares[0] / shares[1]:.2f}" if shares[0] != shares[1] else None


def _sentence(at: Setting) -> str:
    parent, cost = at.parent, account(at.parent)
    shares = ", ".join(f"{b} {flops(at.space, b, at.length):.2f}" for b in BUDGETS)
    return (
        f"Model: layers `{parent.hybrid_layer_pattern}`, hidden size {parent.hidden_size:,}, "
        f"{parent.num_moe_experts} experts of which {parent.moe_router_topk} run, vocabulary {parent.vocab_size:,}, "
        f"{cost.total_params / 1e6:,.0f} million parameters; {at.batch} sequences of {at.length:,} tokens. FLOPs of "
        f"the submodels by those of the parent: {shares}."
    )


def _peak(name: str) -> int:
    """Weights, gradients and everything that two steps keep and make in passing; no imports."""
    device = interleave.start()
    peak = interleave.Peak()
    steps = Steps(setting(device))
    step = CONTENDERS[name](steps)
    step()
    step()
    return peak.bytes()


def _growth(rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of a masked step with soft choices at one, two and four times as many tokens, layers, experts."""
    base = SMALL if device.type == "cpu" else LARGE
    base, length = base.override(hybrid_layer_pattern="ME*-"), 256

    def at(batch: int = 2, **sizes: Any) -> Setting:
        return Setting(base.override(**sizes), batch, length, device)

    series: dict[str, Sequence[tuple[int, Setting]]] = {
        "tokens": [(b * length, at(b)) for b in (2, 4, 8)],
        "layers": [(4 * n, at(hybrid_layer_pattern="ME*-" * n)) for n in (1, 2, 4)],
        "experts": [(n, at(num_moe_experts=n)) for n in (8, 16, 32)],
    }
    rows = []
    for title, points in series.items():
        ratios.say(f"growth with {title}")
        runs = {str(size): Steps(setting).soft() for size, setting in points}
        times = interleave.race(runs, rounds, ratios.say)
        medians = [interleave.spread(times[str(size)])["median"] for size, _ in points]
        rows.append(ratios.growth(f"step, by {title}", [size for size, _ in points], medians))
    return rows


if __name__ == "__main__":
    sys.exit(main())
