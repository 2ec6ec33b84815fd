"""Which optional kernels are installed: the table behind ``elastic-megatron --check``.

Each one is imported as the code that uses it imports it, since a package that is there may still fail: built
for another torch, or without its CUDA extensions.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Literal

from elastic_megatron import __version__


@dataclass(frozen=True)
class Kernel:
    """An optional package.

    ``modules`` are what its users import, ``brings`` is what they gain and ``without`` what happens where it
    is not.
    """

    name: str
    distribution: str
    modules: tuple[str, ...]
    brings: str
    without: str


@dataclass(frozen=True)
class Finding:
    """What became of importing a package; ``reason`` is empty unless it is there and does not import."""

    version: str | None
    state: Literal["found", "missing", "does not import"]
    reason: str = ""


KERNELS = (
    Kernel(
        "Transformer Engine",
        "transformer-engine",
        ("transformer_engine.pytorch",),
        "fused norm and linear, grouped expert GEMM, fused attention, FusedAdam",
        "on a GPU, norms and linears are separate and every expert has its own GEMM",
    ),
    Kernel(
        "Apex gradient fusion",
        "apex",
        ("fused_weight_gradient_mlp_cuda",),
        "weight gradients accumulated inside their GEMM",
        "on a GPU, every weight gradient is accumulated in a step of its own",
    ),
    Kernel(
        "Apex FusedAdam",
        "apex",
        ("amp_C", "apex.optimizers"),
        "fused optimizer step, where Transformer Engine is missing",
        "on a GPU, the optimizer is Transformer Engine's FusedAdam, else torch's AdamW",
    ),
    Kernel(
        "mamba-ssm",
        "mamba-ssm",
        ("mamba_ssm.ops.triton.ssd_combined", "mamba_ssm.ops.triton.layernorm_gated"),
        "Mamba-2 scan and gated norm",
        "on a GPU, Mamba layers cannot be built",
    ),
    Kernel(
        "causal-conv1d",
        "causal-conv1d",
        ("causal_conv1d.causal_conv1d_varlen",),
        "Mamba-2 convolution",
        "on a GPU, Mamba layers cannot be built",
    ),
    Kernel(
        "ModelOpt",
        "nvidia-modelopt",
        ("modelopt.torch.quantization",),
        "quantisers for FP8 and NVFP4",
        "models cannot be quantised",
    ),
)
_MEGATRON = Kernel(
    "megatron-core", "megatron-core", ("megatron.core",), "the models", "models are neither built nor trained"
)
_EMPTY = "an empty package: uninstall transformer_engine, or install transformer_engine[core_cu13,pytorch]"


def look(kernel: Kernel) -> Finding:
    """Import the modules of ``kernel``; an exception becomes the reason, with the last line of its message."""
    try:
        version = metadata.version(kernel.distribution)
    except metadata.PackageNotFoundError:
        version = None
    try:
        for module in kernel.modules:
            import_module(module)
    except Exception as e:
        tops = {module.partition(".")[0] for module in kernel.modules}
        if version is None and isinstance(e, ModuleNotFoundError) and e.name in tops:
            return Finding(None, "missing")
        last = (str(e).strip().splitlines() or [""])[-1].strip()
        reason = f"{type(e).__name__}: {last}" if last else type(e).__name__
        return Finding(version, "does not import", reason)
    return Finding(version, "found")


def devices() -> str:
    """The GPUs of this machine, equal ones counted, or why there is none."""
    import torch

    if not torch.cuda.is_available():
        return f"none, the CPU computes ({_why_no_gpu()})"
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    kinds = Counter((p.name, p.total_memory, f"{p.major}.{p.minor}") for p in properties)
    return "; ".join(
        f"{count} x {name}, {memory / 2**30:.1f} GiB, compute capability {capability}"
        for (name, memory, capability), count in kinds.items()
    )


def _why_no_gpu() -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as e:
        return (str(e).splitlines() or [type(e).__name__])[0].split(". ")[0].rstrip(".")
    return f"torch sees {torch.cuda.device_count()} GPUs"


def report(kernels: tuple[Kernel, ...] = KERNELS) -> str:
    """Versions, devices and the table of ``kernels`` as text; imports all of them, which takes seconds."""
    import torch

    found = [(kernel, look(kernel)) for kernel in (_MEGATRON, *kernels)]
    core = found[0][1]
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    facts = [
        ("elastic-megatron", __version__),
        ("Python", sys.version.split()[0]),
        ("torch", f"{torch.__version__} ({cuda})"),
        ("megatron-core", f"{core.version or ''} {'' if core.state == 'found' else core.state}".strip()),
        ("devices", devices()),
    ]
    heads = ("optional", "version", "state", "brings")
    rows = [(kernel.name, f.version or "-", f.state, kernel.brings) for kernel, f in found[1:]]
    lines = [*_aligned(facts), "", *_aligned([heads, *rows]), ""]
    lines += [line for kernel, finding in found for line in _notes(kernel, finding)]
    return "\n".join(lines).rstrip()


def _notes(kernel: Kernel, finding: Finding) -> list[str]:
    if finding.state == "found":
        return []
    if finding.state == "missing":
        return [f"{kernel.name} is missing: {kernel.without}"]
    notes = [f"{kernel.name} does not import: {finding.reason}"]
    if "meta package" in finding.reason:
        notes.append("  " + _EMPTY)
    return [*notes, f"  without it: {kernel.without}"]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
