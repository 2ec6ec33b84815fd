"""Between a weight and the parts that are stored of it, whatever the format."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import fp8, nvfp4
from .formats import FP8, INPUT_SCALE, NVFP4, WEIGHT, WEIGHT_SCALE, WEIGHT_SCALE_2, Format


def quantise(form: Format, weight: Tensor, amax: Tensor, input_amax: Tensor) -> dict[str, Tensor]:
    """What is stored of a weight [rows, columns], by suffix, in the order of the format's parts.

    Args:
        amax: its largest magnitude, or that of the weight it was cut from: then the result is a slice of that one's.
        input_amax: the largest magnitude of what it is multiplied with.
    """
    if form is NVFP4:
        packed, scales, scale = nvfp4.quantise(weight, amax)
        parts = {WEIGHT: packed, WEIGHT_SCALE: scales, WEIGHT_SCALE_2: scale}
        return parts | {INPUT_SCALE: nvfp4.global_scale(input_amax)}
    assert form is FP8, form
    values, scale = fp8.quantise(weight, amax)
    return {WEIGHT: values, WEIGHT_SCALE: scale, INPUT_SCALE: fp8.scale_of(input_amax)}


def dequantise(form: Format, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns], or rows of it where the parts are rows of theirs."""
    if form is NVFP4:
        return nvfp4.dequantise(parts[WEIGHT], parts[WEIGHT_SCALE], parts[WEIGHT_SCALE_2], dtype)
    assert form is FP8, form
    return fp8.dequantise(parts[WEIGHT], parts[WEIGHT_SCALE], dtype)


def fake_quantise(form: Format, weight: Tensor, amax: Tensor) -> Tensor:
    """The weight as it will be read back, in its dtype; for training, the gradient is the caller's to define."""
    return dequantise(form, quantise(form, weight, amax, amax), weight.dtype)
