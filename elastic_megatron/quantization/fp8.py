"""FP8: e4m3 values and one fp32 scale for a tensor.

Bit for bit what ModelOpt's ``FP8QTensor`` and its exporters pack (modelopt/torch/quantization/qtensor/fp8_tensor.py,
0.47), except for a tensor of zeros, where they compute 0 / 0, and for values beyond ``amax``, which become NaN there
and the largest value here, as in training.

The values are code times scale in fp32, rounded once: what kernels compute. ModelOpt's own ``dequantize`` to BF16
rounds the scale to BF16 first. Its fake quantisation (``fp8_eager``) multiplies by 448 / amax where the packer
divides by amax / 448, so the two differ in the last bits; here training and storing are the same function.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX = 448.0


def scale_of(amax: Tensor) -> Tensor:
    """The fp32 scale of a tensor whose largest magnitude is ``amax``; of a tensor of zeros, as if it were 1."""
    amax = amax.float()
    return torch.where(amax == 0, torch.ones_like(amax), amax) / MAX


def codes(weight: Tensor, scale: Tensor) -> Tensor:
    """The e4m3 values of a weight of any shape under the scale of its tensor.

    The quotient has the weight's dtype, as in ModelOpt: a BF16 weight is rounded to BF16 once more.
    """
    return (weight / scale.reshape(())).clamp(-MAX, MAX).to(torch.float8_e4m3fn)


def quantise(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """(e4m3 values, scale) of a weight of any shape.

    Args:
        amax: largest magnitude of the tensor, or of the one that ``weight`` was cut from.
    """
    scale = scale_of(amax).reshape(())
    return codes(weight, scale), scale


def dequantise(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values: computed in fp32, rounded once to ``dtype``."""
    return (values.float() * scale.reshape(())).to(dtype)


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    """Values as ``dequantise`` reads them back that were quantised under ``scale``, in their dtype."""
    return dequantise(codes(values, scale), scale, values.dtype)
