"""Bit for bit what ModelOpt packs and unpacks."""

from __future__ import annotations

import pytest
import torch
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
from modelopt.torch.quantization.tensor_quant import fp8_eager
from torch import Tensor

from elastic_megatron.quantization import fp8, nvfp4
from elastic_megatron.quantization.formats import FP8, NVFP4
from elastic_megatron.quantization.packing import fake_quantise

DTYPES = [torch.float32, torch.bfloat16]


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def weights(dtype: torch.dtype) -> list[Tensor]:
    """Odd rows; magnitudes over many orders; ties, zeros of both signs, zero and tiny blocks."""
    g = torch.Generator().manual_seed(1)
    random = [torch.randn(33, 16 * n, generator=g) * 10.0 ** (n - 5) for n in range(1, 9)]
    uneven = torch.randn(7, 64, generator=g) * 10 ** (3 * torch.randn(7, 64, generator=g))
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(4)[None] * torch.tensor(
        [[1.0], [-1]]
    )
    ties[0, 0], ties[1, 0] = 6.0 * 448, -0.0
    tiny = torch.zeros(3, 48)
    tiny[:, :16], tiny[0, 16:32], tiny[2, 40] = 1e-7, 1e-30, 5.0
    return [w.to(dtype) for w in (*random, uneven, ties, tiny)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_is_modelopts(dtype: torch.dtype) -> None:
    for weight in weights(dtype):
        theirs, scales, scale = NVFP4QTensor.quantize(weight.clone(), 16)
        ours = nvfp4.quantise(weight, weight.abs().max())
        for a, b in zip(ours, (theirs._quantized_data, scales, scale), strict=True):
            assert a.dtype is b.dtype and torch.equal(bits(a), bits(b))
        for read in DTYPES:
            wanted = theirs.dequantize(read, scale=scales, double_scale=scale, block_sizes={-1: 16})
            assert torch.equal(nvfp4.dequantise(*ours, read), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_with_a_given_scale_is_modelopts(dtype: torch.dtype) -> None:
    for weight in weights(dtype):
        amax = 3.7 * weight.abs().max().float()
        theirs, scales, _ = NVFP4QTensor.quantize(
            weight.clone(), 16, weights_scaling_factor_2=amax / (6.0 * 448.0)
        )
        packed, own, _ = nvfp4.quantise(weight, amax)
        assert torch.equal(packed, theirs._quantized_data)
        assert torch.equal(bits(own), bits(scales))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_is_modelopts(dtype: torch.dtype) -> None:
    """Their reading in BF16 rounds the scale to BF16; kernels do not, and neither do we."""
    for weight in weights(dtype):
        amax = weight.abs().max()
        theirs, scale = FP8QTensor.quantize(weight, scales=amax.float() / 448.0)
        values, own = fp8.quantise(weight, amax)
        assert torch.equal(bits(values), bits(theirs._quantized_data))
        assert torch.equal(own, scale)
        assert torch.equal(
            fp8.dequantise(values, own, torch.float32), theirs.dequantize(torch.float32, scale=scale)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_fake_quantisation_is_within_rounding_of_modelopts(dtype: torch.dtype) -> None:
    """``fp8_eager`` multiplies with the inverse scale, and does not round the quotient to BF16 as the packer does.

    In FP32 the two agree but for the last bits. In BF16 a quotient between two values may first be rounded to the
    middle, and then to the other one, and what is read back lies between two BF16 numbers for many codes: up to a
    fifth of the values differ, by one step of e4m3 at most.
    """
    for weight in weights(dtype)[:9]:
        amax = weight.abs().max()
        ours, theirs = fake_quantise(FP8, weight, amax).float(), fp8_eager(weight, amax).float()
        apart = (ours - theirs).abs() > 1e-6 * theirs.abs() + 1e-7 * amax.float()
        assert apart.float().mean() < (1e-3 if dtype is torch.float32 else 0.2)
        assert ((ours - theirs).abs() <= theirs.abs() / 7 + amax.float() / 448 * 2.0**-9 * 1.001).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantisation_is_what_modelopts_packer_stores(dtype: torch.dtype) -> None:
    for weight in weights(dtype):
        theirs, scales, scale = NVFP4QTensor.quantize(weight.clone(), 16)
        read = theirs.dequantize(dtype, scale=scales, double_scale=scale, block_sizes={-1: 16})
        assert torch.equal(fake_quantise(NVFP4, weight, weight.abs().max()), read)
