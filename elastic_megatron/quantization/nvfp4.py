"""NVFP4: values of four bits (E2M1), an e4m3 scale for 16 of them along the input dimension, one fp32 scale for all.

Bit for bit what ModelOpt's ``NVFP4QTensor`` packs and unpacks (modelopt/torch/quantization/qtensor/nvfp4_tensor.py,
0.47), except for a tensor of zeros, where its scales are 0 / 0.

ModelOpt's Triton kernel for training differs from its packer where the two scales multiply to less than 1e-5: it
flushes such a block to zero. Here training and storing are the same function, so that what is stored was trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import NVFP4

BLOCK = NVFP4.block
MAX = 6.0  # of E2M1
SCALE_MAX = 448.0  # of e4m3
SCALE_MIN = 2.0**-9  # the smallest positive e4m3: a block whose scale rounded to zero would be lost


def global_scale(amax: Tensor) -> Tensor:
    """The fp32 scale of a tensor (``weight_scale_2``, or ``input_scale``) whose largest magnitude is ``amax``.

    With it the largest block scale is e4m3's largest. A tensor of zeros gets the scale of one whose largest is 1.
    """
    amax = amax.float()
    return torch.where(amax == 0, torch.ones_like(amax), amax) / (MAX * SCALE_MAX)


def block_scales(weight: Tensor, scale: Tensor) -> Tensor:
    """The e4m3 scales [..., columns / 16] of a weight [..., columns] under the fp32 scale of its tensor.

    They depend on their own block and ``scale`` alone, so those of a slice by whole blocks are a slice of them.
    """
    found = _blocks(weight).abs().amax(-1).float() / (MAX * scale)
    found = torch.where(found == 0, torch.ones_like(found), found)
    return found.clamp(SCALE_MIN, SCALE_MAX).to(torch.float8_e4m3fn)


def codes(weight: Tensor, scales: Tensor, scale: Tensor) -> Tensor:
    """Codes 0 to 15, uint8 [..., columns], of the nearest values; ties go to the even code."""
    scaled = _scaled(weight, scales, scale)
    sign = (scaled < 0).to(torch.uint8) << 3
    return (sign + _magnitude_codes(scaled).to(torch.uint8)).reshape(weight.shape)


def _scaled(weight: Tensor, scales: Tensor, scale: Tensor) -> Tensor:
    """[..., blocks, 16]"""
    return _blocks(weight) / (scales.float() * scale).unsqueeze(-1)


def _magnitude_codes(scaled: Tensor) -> Tensor:
    """Codes 0 to 7 without the sign, as floats.

    Steps are 1/2 up to 2, 1 up to 4 and 2 beyond: the least of three lines through the codes, each rounded to
    its whole numbers, and ``round`` takes the even one at ties.
    """
    magnitude = scaled.abs()
    code = (2 * magnitude).round_()
    code = torch.minimum(code, magnitude.round().add_(2))
    return torch.minimum(code, (magnitude / 2).round_().add_(4)).clamp_(max=7)


def pack(code: Tensor) -> Tensor:
    """Two codes a byte, uint8 [..., columns / 2]: the even column in the low four bits."""
    return (code[..., 1::2] << 4) | code[..., 0::2]


def unpack(packed: Tensor) -> Tensor:
    """Inverse of ``pack``."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


def quantise(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(packed, block scales, scale) of a weight [..., columns], columns a multiple of 16.

    Args:
        amax: largest magnitude of the tensor, or of the one that ``weight`` was cut from.
    """
    scale = global_scale(amax)
    scales = block_scales(weight, scale)
    return pack(codes(weight, scales, scale)), scales, scale


def dequantise(packed: Tensor, scales: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [..., columns]: computed in fp32, rounded once to ``dtype``."""
    return _values(unpack(packed), scales, scale, dtype)


def rounded(values: Tensor, scale: Tensor) -> Tensor:
    """Values [..., columns] as ``dequantise`` reads them back that were quantised under ``scale``, in their dtype."""
    scales = block_scales(values, scale)
    return _values(codes(values, scales, scale), scales, scale, values.dtype)


def _values(code: Tensor, scales: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # codes count in steps of 1/2 up to 2, of 1 up to 4, then of 2: arithmetic, as a table would have to be moved
    # to the device at every call
    magnitude = (code & 7).float()
    values = torch.maximum(torch.maximum(magnitude / 2, magnitude - 2), 2 * magnitude - 8)
    values = torch.where(code > 7, -values, values) + 0.0  # minus zero is zero
    return (_blocks(values) * (scales.float() * scale).unsqueeze(-1)).reshape(values.shape).to(dtype)


def _blocks(tensor: Tensor) -> Tensor:
    assert tensor.shape[-1] % BLOCK == 0, f"{tensor.shape[-1]} columns are no whole blocks of {BLOCK}"
    return tensor.unflatten(-1, (-1, BLOCK))
