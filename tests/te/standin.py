"""Transformer Engine's own Python code over a stand-in for its compiled module, in plain torch on the CPU.

The kernels' one property that matters here is kept: they take a tensor's address and sizes, and know nothing of its
strides (``makeTransformerEngineTensor`` in TE's ``csrc/common.cpp``). Where they would read other numbers than the
tensor has, the stand-in fails, and names the operand.
"""

from __future__ import annotations

import enum
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

SOURCE = Path(__file__).parents[2] / ".tools/transformer_engine"
# what of TE's Python code asks for a GPU on the way to a kernel: file -> (written, on a CPU)
_EDITS = {"module/base.py": [("if not inp.is_cuda:", "if False:"), ('device="cuda"', 'device="cpu"')]}


class DType(enum.IntEnum):
    kByte, kInt32, kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2, kFloat4E2M1 = (
        0,
        2,
        4,
        5,
        6,
        7,
        8,
        10,
    )


_TORCH = {0: torch.uint8, 2: torch.int32, 4: torch.float32, 5: torch.float16, 6: torch.bfloat16}


class FP8FwdTensors(enum.IntEnum):
    GEMM1_INPUT, GEMM1_WEIGHT, GEMM1_OUTPUT, GEMM2_INPUT, GEMM2_WEIGHT, GEMM2_OUTPUT = range(6)
    GEMM3_INPUT, GEMM3_WEIGHT, GEMM3_OUTPUT = range(6, 9)


class FP8BwdTensors(enum.IntEnum):
    GRAD_OUTPUT1, GRAD_INPUT1, GRAD_OUTPUT2, GRAD_INPUT2, GRAD_OUTPUT3, GRAD_INPUT3 = range(6)


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    NVTE_No_Backend, NVTE_F16_arbitrary_seqlen, NVTE_FP8 = -1, 1, 2


def _pointer(tensor: Tensor, operand: str) -> Tensor:
    assert tensor.is_contiguous(), (
        f"{operand}: sizes {tuple(tensor.shape)} with strides {tensor.stride()} reach a kernel that takes a pointer"
    )
    return tensor


def _dtype(asked: Any, otherwise: torch.dtype) -> torch.dtype:
    if asked is None:
        return otherwise
    return asked if isinstance(asked, torch.dtype) else _TORCH[int(asked)]


def rmsnorm_fwd(x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, dtype: Any,
                margin: int, zero_centered: bool) -> tuple[Tensor, None, Tensor]:  # fmt: skip
    x, weight = _pointer(x, "rmsnorm_fwd input"), _pointer(weight, "rmsnorm_fwd weight")
    assert quantizer is None and not zero_centered
    scale = torch.rsqrt(x.float().square().mean(-1) + eps)
    y = (x.float() * scale[..., None] * weight.float()).to(_dtype(dtype, x.dtype))
    return (y if out is None else out.copy_(y)), None, scale


def rmsnorm_bwd(gradient: Tensor, x: Tensor, scale: Tensor, weight: Tensor, margin: int,
                zero_centered: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    x = _pointer(x, "rmsnorm_bwd input")
    scale, gradient = scale.reshape(*x.shape[:-1], 1), gradient.float().reshape(x.shape)
    normed, weighted = x.float() * scale, gradient * weight.float()
    dx = scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype), (gradient * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


def generic_gemm(A: Tensor, transa: bool, B: Tensor, transb: bool, out: Tensor | None, quantizer: Any, out_dtype: Any,
                 bias: Tensor | None, bias_dtype: Any, gelu: bool, gelu_in: Any, grad: bool, workspace: Any,
                 size: int, accumulate: bool, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None, None, None]:  # fmt: skip
    """``op(B) @ op(A)`` of row-major matrices, as cuBLAS sees column-major ones."""
    A, B = _pointer(A, "gemm A"), _pointer(B, "gemm B")
    assert quantizer is None and not gelu and A.dtype == B.dtype
    product = _product(A, transa, B, transb)
    shape = product.shape if transb else (*B.shape[:-1], product.shape[-1])
    bias_gradient = None
    if bias is not None and bias.numel():
        if grad:
            bias_gradient = B.reshape(-1, B.shape[-1]).float().sum(0).to(_TORCH[int(bias_dtype)])
        else:
            product = product + bias.float()
    if out is None:
        return product.reshape(shape).to(_dtype(out_dtype, A.dtype)), bias_gradient, None, None
    _into(out, product, accumulate, "gemm output")
    return out, bias_gradient, None, None


def te_general_grouped_gemm(A: Sequence[Tensor], transa: bool, B: Sequence[Tensor], transb: bool, D: Sequence[Tensor],
                            out_dtype: Any, m_splits: Sequence[int], bias: Any, bias_dtype: Any, single_output: bool,
                            gelu_in: Any, grad: bool, workspaces: Any, size: int, accumulate: bool,
                            *_: Any) -> Any:  # fmt: skip
    outputs = torch.split(D[0], list(m_splits)) if single_output else D
    for a, b, out in zip(A, B, outputs, strict=True):
        a, b = _pointer(a, "grouped gemm A"), _pointer(b, "grouped gemm B")
        if out.numel():
            _into(out, _product(a, transa, b, transb), accumulate, "grouped gemm output")
    return bias


def _product(A: Tensor, transa: bool, B: Tensor, transb: bool) -> Tensor:
    a, b = (t.reshape(-1, t.shape[-1]).float() for t in (A, B))
    return (b.t() if transb else b) @ (a.t() if transa else a)


def _into(out: Tensor, product: Tensor, accumulate: bool, operand: str) -> None:
    product = product.reshape(_pointer(out, operand).shape)
    if accumulate:
        out.add_(product)
    else:
        out.copy_(product)


class _Names(type):
    """A class of which every constant is 0: enumerations that only tell kernels apart."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        return 0


def _kernels() -> ModuleType:
    """``transformer_engine_torch``: the functions above, and of all others the name, which fails when called."""
    module = ModuleType("transformer_engine_torch")
    for known in (DType, FP8FwdTensors, FP8BwdTensors, NVTE_Fused_Attn_Backend, rmsnorm_fwd, rmsnorm_bwd,
                  generic_gemm, te_general_grouped_gemm):  # fmt: skip
        setattr(module, known.__name__, known)
    module.get_num_cublas_streams = lambda: 4  # type: ignore[attr-defined]
    module.get_cublasLt_version = lambda: 130000  # type: ignore[attr-defined]
    module.get_cudnn_version = lambda: 91000  # type: ignore[attr-defined]

    def other(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            made: Any = _Names(name, (), {"__init__": lambda self, *_, **__: None})
        else:

            def made(*_: Any, **__: Any) -> Any:
                raise NotImplementedError(f"the stand-in has no transformer_engine_torch.{name}")

        setattr(module, name, made)
        return made

    module.__getattr__ = other  # type: ignore[method-assign]
    # one of TE's modules imports all of it by a star, so every name that TE's code mentions must stand there
    code = (file.read_text() for file in (SOURCE / "transformer_engine/pytorch").rglob("*.py"))
    mentioned = {name for text in code for name in re.findall(r"\btex\.([A-Za-z]\w*)", text)}
    for name in mentioned - set(vars(module)):
        other(name)
    module.__all__ = sorted(mentioned)  # type: ignore[attr-defined]
    return module


class _Edited(importlib.machinery.SourceFileLoader):
    def source_to_code(self, data: Any, path: Any, **options: Any) -> Any:  # type: ignore[override]
        text = bytes(data).decode()
        for name, edits in _EDITS.items():
            for written, on_cpu in edits if str(path).endswith(name) else ():
                assert written in text, f"{path} has no {written!r} any more"
                text = text.replace(written, on_cpu)
        return super().source_to_code(text.encode(), path, **options)

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_data(self.path), self.path)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if not name.startswith("transformer_engine.pytorch"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and any(str(spec.origin).endswith(edited) for edited in _EDITS):
            return importlib.util.spec_from_file_location(
                name, spec.origin, loader=_Edited(name, str(spec.origin))
            )
        return spec


def install() -> None:
    """Make ``transformer_engine`` importable in this process, before Megatron looks for it."""
    os.environ.update(NVTE_PROJECT_BUILDING="1", NVTE_RELEASE_BUILD="0", NVTE_TORCH_COMPILE="0")
    sys.path.insert(0, str(SOURCE))
    sys.meta_path.insert(0, _Finder())
    sys.modules["transformer_engine_torch"] = _kernels()
    onnx = MagicMock()  # wants a package that nothing else needs
    onnx.__spec__ = importlib.machinery.ModuleSpec("transformer_engine.pytorch.onnx_extensions", None)
    sys.modules["transformer_engine.pytorch.onnx_extensions"] = onnx
    card = types.SimpleNamespace(
        multi_processor_count=132, major=9, minor=0, name="none", total_memory=80 << 30
    )
    torch.cuda.get_device_properties = lambda *_: card  # type: ignore[assignment, return-value]
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    # the package loads its kernels on import; so their loader is replaced in `common`, which comes without them
    package = ModuleType("transformer_engine")
    package.__path__ = [str(SOURCE / "transformer_engine")]
    sys.modules["transformer_engine"] = package
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda _: None  # type: ignore[attr-defined]
    del sys.modules["transformer_engine"]
    importlib.import_module("transformer_engine").common = common  # type: ignore[attr-defined]
