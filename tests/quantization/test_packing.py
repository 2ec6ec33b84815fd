"""NVFP4 and FP8 by hand and by their definitions; what ModelOpt computes is compared elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elastic_megatron.quantization import fp8, nvfp4
from elastic_megatron.quantization.formats import (
    FORMATS,
    FP8,
    NVFP4,
    WEIGHT,
    WEIGHT_SCALE,
    WEIGHT_SCALE_2,
    Format,
)
from elastic_megatron.quantization.packing import (
    dequantise,
    fake_quantise,
    part_rows,
    quantise,
    rounded,
    scale_of,
)

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ONE = torch.tensor(1.0)


def nearest(value: float) -> float:
    """The nearest E2M1 value, ties to the even mantissa, by trying them all."""
    distances = [abs(abs(value) - m) for m in MAGNITUDES]
    ties = [i for i, d in enumerate(distances) if d == min(distances)]
    best = next(i for i in ties if len(ties) == 1 or i % 2 == 0)
    return math.copysign(MAGNITUDES[best], value) if MAGNITUDES[best] else 0.0


def in_one_block(values: list[float]) -> Tensor:
    """Values in a block whose scale is one in a tensor whose scale is one: its largest is 6, the tensor's 6 * 448."""
    block = torch.tensor(values + [0.0] * (15 - len(values)) + [6.0])
    return torch.cat([block, torch.tensor([6.0 * 448] * 16)])[None]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0),
        (0.26, 0.5), (0.74, 0.5), (5.1, 6.0), (-0.75, -1.0), (-2.5, -2.0), (-0.2, 0.0), (-0.0, 0.0), (6.0, 6.0),
    ],
)  # fmt: skip
def test_values_round_to_the_nearest_and_ties_to_even(value: float, expected: float) -> None:
    weight = in_one_block([value])
    assert nvfp4.global_scale(weight.abs().max()) == 1
    assert nearest(value) == expected
    assert fake_quantise(NVFP4, weight, weight.abs().max())[0, 0] == expected


@given(st.lists(st.floats(-6, 6, width=32), min_size=15, max_size=15))
def test_a_block_of_scale_one_rounds_each_value_alone(values: list[float]) -> None:
    weight = in_one_block(values)
    found = fake_quantise(NVFP4, weight, weight.abs().max())[0, :15]
    assert found.tolist() == [nearest(v) for v in torch.tensor(values).tolist()]


def test_the_even_column_is_in_the_low_half_of_its_byte() -> None:
    packed, scales, scale = nvfp4.quantise(in_one_block([0.5, 6.0, -1.0, -6.0]), torch.tensor(6.0 * 448))
    assert packed[0, :2].tolist() == [0x71, 0xFA]
    assert (packed.shape, scales.shape, scale.shape) == ((1, 16), (1, 2), ())
    assert (packed.dtype, scales.dtype, scale.dtype) == (torch.uint8, torch.float8_e4m3fn, torch.float32)


@given(st.lists(st.integers(0, 15), min_size=2, max_size=40).filter(lambda c: len(c) % 2 == 0))
def test_unpack_is_the_inverse_of_pack(codes: list[int]) -> None:
    code = torch.tensor([codes, codes[::-1]], dtype=torch.uint8)
    assert torch.equal(nvfp4.unpack(nvfp4.pack(code)), code)


def test_a_tiny_block_keeps_the_smallest_scale_and_a_zero_block_scale_one() -> None:
    weight = torch.cat([torch.full((16,), 1e-6), torch.zeros(16), torch.full((16,), 6.0 * 448)])[None]
    packed, scales, _ = nvfp4.quantise(weight, weight.max())
    assert scales.float()[0].tolist() == [2.0**-9, 1.0, 448.0]
    assert not packed[0, :16].any()
    # at a quarter of the smallest scale it still rounds to zero, above it is half of it
    above = torch.cat([torch.full((16,), 2.0**-11 * 1.01), torch.full((16,), 6.0 * 448)])[None]
    assert fake_quantise(NVFP4, above, above.max())[0, 0] == 2.0**-10


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_are_zeros(form: Format, dtype: torch.dtype) -> None:
    zeros = torch.zeros(3, 32, dtype=dtype)
    parts = quantise(form, zeros, zeros.abs().max(), zeros.max())
    assert all(
        torch.isfinite(p.float()).all() and (p.float() > 0).all() for s, p in parts.items() if "scale" in s
    )
    assert torch.equal(dequantise(form, parts, dtype), zeros)


WEIGHTS = st.builds(
    lambda rows, blocks, seed, spread, dtype: (
        torch.randn(rows, 16 * blocks, generator=(g := torch.Generator().manual_seed(seed)))
        * 10 ** (spread * torch.randn(rows, 1, generator=g))
    ).to(dtype),
    st.integers(1, 5), st.integers(1, 6), st.integers(0, 999), st.floats(0, 2),
    st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip


@given(WEIGHTS)
def test_errors_stay_within_half_a_step(weight: Tensor) -> None:
    """NVFP4: one times the scale of the block, as steps are two at its top; FP8: a sixteenth of the value, or 2^-10."""
    amax, exact = weight.abs().max(), weight.float()
    parts = quantise(NVFP4, weight, amax, ONE)
    steps = (parts[WEIGHT_SCALE].float() * parts[WEIGHT_SCALE_2]).repeat_interleave(16, 1)
    error = (dequantise(NVFP4, parts, torch.float32) - exact).abs()
    # e4m3 may round a scale down, by a sixteenth or 2^-10, and the block's largest then lies beyond its last value
    rounded = exact.abs() / 16 + 6 * 2.0**-10 * parts[WEIGHT_SCALE_2]
    assert (error <= 1.001 * (steps + rounded)).all()
    parts = quantise(FP8, weight, amax, ONE)
    error = (dequantise(FP8, parts, torch.float32) - exact).abs()
    assert (error <= exact.abs() / 15 + parts[WEIGHT_SCALE] * 1.001 * 2.0**-10).all()


@given(WEIGHTS, st.data())
def test_slices_by_rows_and_whole_blocks_commute_with_quantising(weight: Tensor, data: st.DataObject) -> None:
    """With the parent's largest magnitude; nothing but the number for the whole tensor is shared by blocks."""
    amax = weight.abs().max()
    rows = data.draw(st.lists(st.integers(0, len(weight) - 1), min_size=1))
    blocks = data.draw(st.lists(st.integers(0, weight.shape[1] // 16 - 1), min_size=1))
    columns = [16 * b + i for b in blocks for i in range(16)]
    for form in (FP8, NVFP4):
        whole = quantise(form, weight, amax, ONE)
        part = quantise(form, weight[rows][:, columns], amax, ONE)
        width = {p.suffix: p.columns for p in form.parts}
        for suffix, tensor in part.items():
            wanted = whole[suffix]
            if per := width[suffix]:
                wanted = wanted[rows].unflatten(1, (-1, 16 // per))[:, blocks].flatten(1)
            assert torch.equal(tensor.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)), (
                suffix
            )
        assert torch.equal(
            dequantise(form, part, weight.dtype), dequantise(form, whole, weight.dtype)[rows][:, columns]
        )


@given(WEIGHTS)
def test_what_is_read_back_is_packed_to_itself(weight: Tensor) -> None:
    """Values of a format are its own nearest values; the scales that fit them may be others."""
    amax = weight.abs().max()
    _, scales, scale = nvfp4.quantise(weight, amax)
    once = nvfp4.dequantise(nvfp4.pack(nvfp4.codes(weight, scales, scale)), scales, scale, torch.float32)
    again = nvfp4.dequantise(nvfp4.pack(nvfp4.codes(once, scales, scale)), scales, scale, torch.float32)
    assert torch.equal(once, again)


@given(WEIGHTS, st.floats(0.3, 2))
def test_rounding_is_packing_and_reading_back(weight: Tensor, share: float) -> None:
    """Also where the frozen magnitude is no longer the largest; and parts are the same alone and by rows."""
    amax = share * weight.abs().max().float()
    for form in (FP8, NVFP4):
        parts = quantise(form, weight, amax, ONE)
        read = dequantise(form, parts, weight.dtype)
        for found in (fake_quantise(form, weight, amax), rounded(form, weight, scale_of(form, amax))):
            assert found.dtype is weight.dtype
            assert torch.equal(found.view(torch.uint8), read.view(torch.uint8))
        for part in form.parts:
            if part.columns:
                own = torch.cat([part_rows(form, part, row[None], amax) for row in weight])
                assert torch.equal(own.view(torch.uint8), parts[part.suffix].view(torch.uint8))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_scale_may_have_a_dimension(form: Format) -> None:
    """Input scales of FP8 are [1] on disk, and BF16 inputs stay BF16 in the quotient."""
    values, scale = torch.randn(3, 2, 32).bfloat16(), scale_of(form, torch.tensor(2.5))
    assert torch.equal(rounded(form, values, scale.reshape(1)), rounded(form, values, scale))
    assert rounded(form, values[:0], scale).shape == (0, 2, 32)


def test_fp8_values_beyond_the_largest_are_the_largest() -> None:
    values, scale = fp8.quantise(torch.tensor([[3.0, -7.0, 1.0, 2.0**-20]]), torch.tensor(2.0))
    assert values.float().tolist() == [[448.0, -448.0, 224.0, 0.0]] and scale == 2 / 448


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_parts_are_what_the_format_says(form: Format) -> None:
    weight = torch.randn(7, 48)
    parts = quantise(form, weight, weight.abs().max(), ONE)
    stated = {
        p.suffix: (getattr(torch, p.dtype), (7, 48 // p.columns) if p.columns else ()) for p in form.parts
    }
    assert {s: (t.dtype, tuple(t.shape)) for s, t in parts.items()} == stated
    assert next(iter(parts)) == WEIGHT and form.nbytes(7, 48) == sum(t.nbytes for t in parts.values())


def test_columns_that_are_no_whole_blocks_are_a_mistake() -> None:
    with pytest.raises(AssertionError, match="24 columns are no whole blocks of 16"):
        nvfp4.quantise(torch.randn(2, 24), ONE)
