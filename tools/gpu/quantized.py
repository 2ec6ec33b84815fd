"""Step ``quantized``: NVFP4 by calibration, then distillation on rounded weights, and what attention runs on."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from elastic_megatron import runtime
from elastic_megatron.training.train import train
from gpu.bench import Bench
from gpu.models import logged, losses, parent, recipe, scale

STEPS = 3
_ATTENTION = ("attention", "attn", "flash", "fmha", "sdpa", "softmax")


def quantized(bench: Bench) -> None:
    """Calibrate and train on a family whose widths stay; the losses tell that weights are rounded, and how far."""
    parent(bench)
    if bench.rehearse:
        bench.stands_in("rounding in torch, attention of torch on the CPU")
    length = scale(bench).length
    run = recipe(
        bench, "qad", steps=STEPS, parallel={"overlap": True},
        quantize={"format": "nvfp4", "preset": "default", "samples": 4, "seq_length": length},
    )  # fmt: skip
    with _Attention() as attention:
        train(run)
    evaluated = {
        x["eval"]["weights"]: x["eval"]["submodels"] for x in logged(run) if "weights" in x.get("eval", {})
    }
    _rounded(bench, evaluated, scale(bench).dtype)
    steps = losses(run)
    finite = [x["loss"] for x in steps if math.isfinite(x["loss"]) and x["updated"]]
    bench.at_most("steps without an update or a finite loss", STEPS - len(finite), 0)
    bench.number("last step", steps[-1]["step_ms"], "ms")
    if runtime.start(seed=1).device.type != "cpu":
        bench.number("peak memory", torch.accelerator.max_memory_allocated() / 2**30, "GiB")
    for module, kernels in attention.kernels.items():
        bench.says(f"attention, {module}", ", ".join(sorted(kernels)) or "no kernel with a name of attention")
    bench.at_most("attention seen to run (0: yes)", int(not attention.kernels), 0)


def _rounded(bench: Bench, evaluated: dict[str, Any], before: str) -> None:
    """Losses before and after: rounding moves them, and not to infinity."""
    for name, submodel in evaluated["nvfp4"].items():
        was = evaluated[before][name]["loss"]
        bench.at_most(f"{name}, loss rounded by the loss before", submodel["loss"] / was, 2.0)
    moved = [abs(s["loss"] - evaluated[before][n]["loss"]) for n, s in evaluated["nvfp4"].items()]
    bench.at_most("sizes whose loss rounding has not moved", sum(m == 0 for m in moved), 0)


class _Attention:
    """Watches the first call of every class of core attention that runs: names of kernels, or of operators on a CPU."""

    def __init__(self) -> None:
        self.kernels: dict[str, set[str]] = {}
        self._profile: Any = None

    def __enter__(self) -> _Attention:
        hooks = torch.nn.modules.module
        self._handles = [
            hooks.register_module_forward_pre_hook(self._begin),
            hooks.register_module_forward_hook(self._end),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, _: Any) -> None:
        name = type(module).__name__
        if (
            name.endswith(("DotProductAttention", "CoreAttention"))
            and not self._profile
            and name not in self.kernels
        ):
            self._profile = torch.profiler.profile(), name
            self._profile[0].start()

    def _end(self, module: nn.Module, _: Any, __: Any) -> None:
        if self._profile is None or type(module).__name__ != self._profile[1]:
            return
        (profile, name), self._profile = self._profile, None
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        profile.stop()
        names = {event.key for event in profile.key_averages()}
        self.kernels[name] = {n[:80] for n in names if any(word in n.lower() for word in _ATTENTION)}
