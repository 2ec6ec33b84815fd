"""Step ``speed``: what elastic steps cost beside stock ones, in time and memory."""

from __future__ import annotations

import interleave
import torch
from step_models import CONTENDERS, Setting, Steps, flops

from elastic_megatron import runtime
from elastic_megatron.cost.account import flops_per_token
from elastic_megatron.cost.sizes import sizes_of_parent
from elastic_megatron.recipe.gpus import GPUS
from gpu.bench import Bench
from gpu.models import config, scale

# the goals on paper at true shapes, and what of it each runs
RUN = {
    "stock": None,
    "masked, soft": 1.12,
    "sliced, full": 1.02,
    "sliced, small": None,
    "extracted, small": None,
}
PATTERN = "MEMEM*"


def speed(bench: Bench) -> None:
    """Forward and backward passes of six layers, side by side; no optimizer and no teacher."""
    sizes, device = scale(bench), runtime.start(seed=1).device
    if bench.rehearse:
        bench.stands_in("one CPU thread: none of these times and bytes is a GPU's")
    at = Setting(sizes.parent.override(hybrid_layer_pattern=PATTERN), 1, sizes.length, device)
    with config(gradient_accumulation_fusion=False, **runtime.fused_experts()):
        steps = Steps(at)
        contenders = {name: CONTENDERS[name](steps) for name in RUN}
    times = interleave.race(contenders, rounds=2 if bench.rehearse else 7)
    for name, goal in RUN.items():
        seconds = interleave.spread(times[name])["median"]
        bench.number(f"{name}, step", 1e3 * seconds, "ms")
        bench.number(f"{name}, tokens per second", at.tokens / seconds)
        _utilization(bench, name, at, seconds)
        if goal is not None:
            bench.goal(f"{name} / stock, time", interleave.ratio(times, [name], ["stock"])["median"], goal)
    ratio = interleave.ratio(times, ["sliced, small"], ["extracted, small"])
    bench.number("sliced small / extracted small, time", ratio["median"])
    peaks = {}
    for name, step in contenders.items():
        peak = interleave.Peak()
        step()
        peaks[name] = peak.bytes()
        bench.number(f"{name}, most memory above weights and gradients", peaks[name] / 2**20, "MiB")
    bench.goal("masked, soft / stock, that memory", peaks["masked, soft"] / max(peaks["stock"], 1), 1.05)


def _utilization(bench: Bench, name: str, at: Setting, seconds: float) -> None:
    """The share of the GPU's dense BF16 rate, by the FLOPs that the mathematics needs: of a masked step, all."""
    budget = name.removeprefix("sliced, ").removeprefix("extracted, ")
    share = flops(at.space, budget, at.length) if budget in ("full", "small") else 1.0
    computed = 3 * share * at.tokens * flops_per_token(sizes_of_parent(at.parent), at.length)
    bench.number(f"{name}, model FLOPs per second", computed / seconds / 1e12, "T")
    if (peak := _peak(at.device)) is not None:
        bench.number(f"{name}, MFU", 100 * computed / seconds / 1e12 / peak, "%")


def _peak(device: torch.device) -> float | None:
    """Dense BF16 TFLOPS of this GPU, where the table of ``plan`` knows it."""
    if device.type == "cpu":
        return None
    title = interleave.describe(device)["device"].lower()
    known = [
        gpu.bf16_tflops
        for name, gpu in GPUS.items()
        if name.partition("-")[0] in title.replace("-", " ").split()
    ]
    return known[0] if known else None
