"""mamba-ssm's Triton kernels in Triton's interpreter on the CPU, and around them the two of causal-conv1d in torch.

The interpreter computes what the kernels compute, block by block, with numpy: a fault in indices, strides, masks or
sizes shows; one in a compiler or a race between blocks does not.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import types
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read at import

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime import interpreter

SOURCE = Path(__file__).parents[2] / ".tools/mamba_ssm"
launched: Counter[str] = Counter()  # kernels by name


def install() -> None:
    """Make ``mamba_ssm`` importable in this process; its ``__init__`` asks for compiled modules, and is left out."""
    measured = triton.autotune

    def smallest(configs: Any, key: Any, **options: Any) -> Any:
        """Of the configs that are timed against each other on a GPU, the one with the smallest blocks."""
        options.pop("cache_results", None)
        blocks = [math.prod(v for k, v in c.kwargs.items() if k.startswith("BLOCK")) for c in configs]
        return measured([configs[blocks.index(min(blocks))]], key, **options)

    triton.autotune = smallest
    torch.cuda.device = lambda *_: nullcontext()  # type: ignore[assignment, misc]
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=2)  # type: ignore[assignment, return-value]
    run = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    interpreter.GridExecutor.__call__ = counted
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(SOURCE.joinpath(*name.split(".")))]
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = package
    made = {
        "causal_conv1d": {"causal_conv1d_fn": None, "__path__": []},
        "causal_conv1d.cpp_functions": {
            "causal_conv1d_fwd_function": _convolve,
            "causal_conv1d_bwd_function": _convolve_backward,
            "causal_conv1d_update_function": None,
        },
        "causal_conv1d.causal_conv1d_varlen": {"causal_conv1d_varlen_states": None},
    }
    for name, content in made.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module


def _refuse(x: Tensor, what: str) -> None:
    """What csrc/causal_conv1d.cpp of causal-conv1d 1.6 refuses of [batch, channels, length]."""
    assert x.stride(2) == 1 or x.stride(1) == 1, (what, x.stride())
    if x.stride(1) == 1 and x.stride(2) > 1:
        assert x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0, (what, x.stride())


def _sum(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    y = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight.unsqueeze(1), bias, groups=x.shape[1])
    return F.silu(y) if silu else y


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: None, initial: None, final: None,
              silu: bool) -> Tensor:  # fmt: skip
    _refuse(x, "input")
    launched["causal_conv1d_fwd"] += 1
    return torch.empty_like(x).copy_(_sum(x.float(), weight.float(), bias.float(), silu))


def _convolve_backward(x: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor, seq_idx: None, initial: None,
                       d_final: None, dx: Tensor | None, d_initial: bool, silu: bool) -> tuple[Any, ...]:  # fmt: skip
    _refuse(x, "input")
    _refuse(gradient, "gradient")
    launched["causal_conv1d_bwd"] += 1
    leaves = [t.detach().float().requires_grad_() for t in (x, weight, bias)]
    with torch.enable_grad():
        found = torch.autograd.grad(_sum(*leaves, silu), leaves, gradient.float())
    dx = torch.empty_like(x) if dx is None else dx
    return dx.copy_(found[0]), found[1].to(weight.dtype), found[2].to(bias.dtype), None
