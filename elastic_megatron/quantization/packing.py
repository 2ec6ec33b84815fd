"""Between a weight and the parts that are stored of it, whatever the format."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from . import fp8, nvfp4
from .formats import FP8, INPUT_SCALE, NVFP4, WEIGHT, WEIGHT_SCALE, WEIGHT_SCALE_2, Format, Part


def quantise(form: Format, weight: Tensor, amax: Tensor, input_amax: Tensor) -> dict[str, Tensor]:
    """What is stored of a weight [rows, columns], by suffix, in the order of the format's parts.

    Args:
        amax: its largest magnitude, or that of the weight it was cut from: then the result is a slice of that one's.
        input_amax: the largest magnitude of what it is multiplied with.
    """
    own = scalars(form, amax, input_amax)
    return {p.suffix: part_rows(form, p, weight, amax) if p.columns else own[p.suffix] for p in form.parts}


def part_rows(form: Format, part: Part, weight: Tensor, amax: Tensor) -> Tensor:
    """One of the parts that have rows, of some or all rows of a weight; ``amax`` is that of the whole weight.

    An infinite weight, which rounding would make a large one, becomes NaN: the code in FP8, in NVFP4 the scale of the
    block.
    """
    scale, infinite = scale_of(form, amax), weight.isinf()
    if form is FP8:
        return fp8.codes(weight.masked_fill(infinite, torch.nan), scale)
    scales = nvfp4.block_scales(weight.masked_fill(infinite, torch.nan), scale)
    return scales if part.suffix == WEIGHT_SCALE else nvfp4.pack(nvfp4.codes(weight, scales, scale))


def scalars(form: Format, amax: Tensor, input_amax: Tensor) -> dict[str, Tensor]:
    """The parts that are one number, by suffix."""
    own = WEIGHT_SCALE_2 if form is NVFP4 else WEIGHT_SCALE
    return {own: scale_of(form, amax), INPUT_SCALE: scale_of(form, input_amax)}


def scale_of(form: Format, amax: Tensor) -> Tensor:
    """The fp32 scale of a tensor whose largest magnitude is ``amax``."""
    if form is NVFP4:
        return nvfp4.global_scale(amax)
    assert form is FP8, form
    return fp8.scale_of(amax)


def dequantise(form: Format, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns], or rows of it where the parts are rows of theirs."""
    if form is NVFP4:
        return nvfp4.dequantise(parts[WEIGHT], parts[WEIGHT_SCALE], parts[WEIGHT_SCALE_2], dtype)
    assert form is FP8, form
    return fp8.dequantise(parts[WEIGHT], parts[WEIGHT_SCALE], dtype)


def fake_quantise(form: Format, weight: Tensor, amax: Tensor) -> Tensor:
    """The weight as it will be read back, in its dtype; for training, the gradient is the caller's to define."""
    return rounded(form, weight, scale_of(form, amax))


def rounded(form: Format, values: Tensor, scale: Tensor) -> Tensor:
    """``fake_quantise`` of values [..., columns] under the fp32 scale of their tensor."""
    return (nvfp4 if form is NVFP4 else fp8).rounded(values, scale)
