"""The chunked scan equals the token-by-token recurrence: outputs, final states, all gradients."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elastic_megatron.errors import UserError
from elastic_megatron.runtime import ssd, ssd_conv, ssd_scan
from elastic_megatron.runtime.ssd_reference import causal_conv1d_reference, ssd_reference


@dataclass(frozen=True)
class Case:
    batch: int
    length: int
    groups: int
    heads_per_group: int
    head_dim: int
    state: int
    chunk: int
    block: int
    wide_d: bool
    softplus: bool
    limit: tuple[float, float]


CASES = st.builds(
    Case,
    batch=st.sampled_from([1, 3]),
    length=st.integers(1, 70),
    groups=st.sampled_from([1, 2, 3]),
    heads_per_group=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([1, 4, 6]),
    state=st.sampled_from([1, 5, 8]),
    chunk=st.sampled_from([1, 16, 128]),
    block=st.sampled_from([1, 400, 10**6]),
    wide_d=st.booleans(),
    softplus=st.booleans(),
    limit=st.sampled_from([(0.0, float("inf")), (0.05, 0.4)]),
)


def inputs(case: Case) -> dict[str, Tensor]:
    heads = case.groups * case.heads_per_group
    generator = torch.Generator().manual_seed(case.length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tensors = {
        "x": draw(case.batch, case.length, heads, case.head_dim),
        "dt": draw(case.batch, case.length, heads) - (1 if case.softplus else 0),
        "A": -0.5 - 8 * draw(heads).sigmoid(),
        "B": draw(case.batch, case.length, case.groups, case.state),
        "C": draw(case.batch, case.length, case.groups, case.state),
        "D": draw(heads, case.head_dim) if case.wide_d else draw(heads),
        "z": draw(case.batch, case.length, heads, case.head_dim),
        "dt_bias": 0.1 * draw(heads),
        "initial_states": draw(case.batch, heads, case.head_dim, case.state),
    }
    if not case.softplus:
        tensors["dt"] = tensors["dt"].abs()
    return {name: t.requires_grad_() for name, t in tensors.items()}


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-30))


@given(CASES)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_chunked_equals_recurrence(case: Case) -> None:
    tensors = inputs(case)
    options: dict[str, Any] = dict(dt_softplus=case.softplus, dt_limit=case.limit)
    expected = ssd_reference(**tensors, **options)
    blocks = ssd_scan._BLOCK_ELEMENTS
    try:
        ssd_scan._BLOCK_ELEMENTS = case.block
        found = ssd.mamba_chunk_scan_combined(
            **tensors, **options, chunk_size=case.chunk, return_final_states=True
        )
        weights = [torch.randn_like(t) for t in expected]
        gradients = [
            torch.autograd.grad(outputs, list(tensors.values()), weights) for outputs in (found, expected)
        ]
    finally:
        ssd_scan._BLOCK_ELEMENTS = blocks
    assert relative(found[0], expected[0]) < 1e-12
    assert relative(found[1], expected[1]) < 1e-12
    for name, ours, theirs in zip(tensors, *gradients, strict=True):
        scale = max(1.0, float(theirs.abs().max()))
        assert float((ours - theirs).abs().max()) < 1e-12 * scale, name


@pytest.mark.parametrize("missing", [("D",), ("z",), ("D", "z"), ("dt_bias", "initial_states")])
def test_optional_inputs_may_be_left_out(missing: tuple[str, ...]) -> None:
    case = Case(2, 37, 2, 2, 4, 5, 16, 10**6, False, True, (0.0, float("inf")))
    tensors = {name: t for name, t in inputs(case).items() if name not in missing}
    expected, _ = ssd_reference(**tensors, dt_softplus=True)
    found = ssd.mamba_chunk_scan_combined(**tensors, dt_softplus=True, chunk_size=16)
    assert relative(found, expected) < 1e-12
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), list(tensors.values())),
        torch.autograd.grad(expected.sum(), list(tensors.values())),
        strict=True,
    ):
        assert relative(ours, theirs) < 1e-12


def test_only_the_final_state_may_be_asked_for() -> None:
    tensors = inputs(Case(1, 20, 1, 2, 4, 5, 8, 10**6, False, True, (0.0, float("inf"))))
    del tensors["D"], tensors["z"]
    gradients = []
    for scan in (
        ssd_reference,
        lambda **k: ssd.mamba_chunk_scan_combined(**k, chunk_size=8, return_final_states=True),
    ):
        _, state = scan(**tensors, dt_softplus=True)
        wanted = [t for name, t in tensors.items() if name != "C"]
        gradients.append(torch.autograd.grad(state.square().sum(), wanted))
    assert max(relative(a, b) for a, b in zip(*gradients, strict=True)) < 1e-12


def test_steep_decays_stay_finite() -> None:
    """``exp(cum_i - cum_j)`` overflows above the diagonal, where it must not reach the result."""
    tensors = inputs(Case(1, 64, 1, 1, 4, 5, 64, 10**6, False, True, (0.0, float("inf"))))
    tensors = {name: t.detach().float() for name, t in tensors.items()}
    tensors["dt"] = (tensors["dt"] + 30).requires_grad_()
    y = ssd.mamba_chunk_scan_combined(**tensors, dt_softplus=True, chunk_size=64)
    y.sum().backward()
    assert bool(y.isfinite().all()) and bool(tensors["dt"].grad.isfinite().all())  # type: ignore[union-attr]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_low_precision_inputs_keep_their_dtype(dtype: torch.dtype, tolerance: float) -> None:
    tensors = inputs(Case(2, 50, 2, 2, 8, 8, 128, 10**6, False, True, (0.0, float("inf"))))
    expected, _ = ssd_reference(**tensors, dt_softplus=True)
    low = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    found = ssd.mamba_chunk_scan_combined(**low, dt_softplus=True, chunk_size=128)
    found.sum().backward()
    assert found.dtype == dtype and low["x"].grad is not None and low["x"].grad.dtype == dtype
    assert relative(found.double(), expected) < tolerance


def test_packed_sequences_are_refused() -> None:
    tensors = inputs(Case(1, 4, 1, 1, 2, 2, 4, 10**6, False, True, (0.0, float("inf"))))
    with pytest.raises(UserError, match="packed sequences"):
        ssd.mamba_chunk_scan_combined(**tensors, chunk_size=4, seq_idx=torch.zeros(1, 4, dtype=torch.int32))


@given(
    st.sampled_from([1, 3]),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([1, 10**6]),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_convolution_equals_its_definition(
    batch: int, length: int, channels: int, width: int, block: int
) -> None:
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, length, channels), (channels, width), (channels,)]
    tensors = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    blocks = ssd_conv._BLOCK_ELEMENTS
    try:
        ssd_conv._BLOCK_ELEMENTS = block
        found = ssd.causal_conv1d(*tensors)
        expected = causal_conv1d_reference(*tensors)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        weight = torch.randn_like(found)
        for ours, theirs in zip(
            torch.autograd.grad(found, tensors, weight),
            torch.autograd.grad(expected, tensors, weight),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    finally:
        ssd_conv._BLOCK_ELEMENTS = blocks


@pytest.mark.parametrize("wide_d", [False, True])
def test_split_convolve_scan_and_gate_equals_its_parts(wide_d: bool) -> None:
    batch, length, groups, heads, head_dim, state = 2, 19, 2, 4, 3, 5
    torch.manual_seed(0)
    inner, bc = heads * head_dim, groups * state
    zxbcdt = torch.randn(batch, length, 2 * inner + 2 * bc + heads, dtype=torch.float64)
    weight, bias = torch.randn(inner + 2 * bc, 4).double(), torch.randn(inner + 2 * bc).double()
    dt_bias, A = torch.randn(heads).double(), -torch.rand(heads).double()
    D = torch.randn(heads, head_dim).double() if wide_d else torch.randn(heads).double()
    found = ssd.mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, A, D, 8, headdim=None if wide_d else head_dim, ngroups=groups
    )
    z, x, B, C, dt = zxbcdt.split([inner, inner, bc, bc, heads], dim=-1)
    x, B, C = causal_conv1d_reference(torch.cat([x, B, C], -1), weight, bias).split([inner, bc, bc], dim=-1)
    expected, _ = ssd_reference(
        x.unflatten(-1, (heads, -1)), dt, A, B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1)),
        D=D, z=z.unflatten(-1, (heads, -1)), dt_bias=dt_bias, dt_softplus=True,
    )  # fmt: skip
    torch.testing.assert_close(found, expected.flatten(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", [False, True])
def test_gated_norm_equals_its_definition(before: bool) -> None:
    torch.manual_seed(0)
    norm = ssd.RMSNormGated(12, eps=1e-5, group_size=4, norm_before_gate=before, dtype=torch.float64)
    torch.nn.init.normal_(norm.weight)
    x, z = torch.randn(3, 12, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    gate = z * z.sigmoid()
    value = x if before else x * gate
    rms = torch.stack([(g.square().mean(-1, keepdim=True) + 1e-5).sqrt() for g in value.split(4, -1)], 1)
    expected = value / rms.repeat_interleave(4, 1).squeeze(-1) * norm.weight * (gate if before else 1)
    torch.testing.assert_close(norm(x, z), expected, rtol=1e-12, atol=1e-12)
