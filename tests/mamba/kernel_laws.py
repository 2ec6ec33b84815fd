"""mamba-ssm's kernels against this project's own in torch: prints relative errors as JSON. Run by ``test_mamba_kernels``.

``python kernel_laws.py PART``; a program of its own, since the interpreter's flag is read when triton is imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import interpreter

interpreter.install()

import torch  # noqa: E402
from mamba_ssm.ops.triton import layernorm_gated, ssd_combined  # noqa: E402  # type: ignore[import-not-found]
from torch import Tensor  # noqa: E402

from elastic_megatron.runtime import ssd  # noqa: E402


@dataclass(frozen=True)
class Case:
    """A scan. ``strided``: its input is a part of wider rows. Half precision is fp16: the interpreter has no bf16."""

    heads: int = 4
    head_dim: int = 16
    groups: int = 2
    state: int = 16
    length: int = 40
    batch: int = 1
    dtype: torch.dtype = torch.float32
    strided: bool = False


FEW = {
    "plain": Case(),
    "strided, a ragged chunk, two sequences": Case(strided=True, length=33, batch=2),
}
MANY = {
    "three heads a group": Case(heads=6, state=12),
    "widths that are no powers of two": Case(heads=2, head_dim=24, state=12),
    "head width of Nemotron": Case(heads=2, head_dim=64, state=128, groups=1, length=70),
    "shorter than the convolution": Case(length=3),
    "half precision": Case(dtype=torch.float16),
    "half precision, strided": Case(dtype=torch.float16, strided=True, length=65),
}
NAMES = ("y", "zxbcdt", "conv weight", "conv bias", "dt bias", "A", "D")


def tensors(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    inner, states = case.heads * case.head_dim, case.groups * case.state
    width = 2 * inner + 2 * states + case.heads

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows = draw(case.batch, case.length, width + (8 if case.strided else 0))[..., :width]
    wide = [rows, draw(inner + 2 * states, 4) / 2, draw(inner + 2 * states) / 2, draw(case.heads) - 2]
    return [*(t.to(case.dtype) for t in wide), draw(case.heads).sigmoid(), draw(case.heads)]


def scan(kernel: Callable[..., Any], case: Case, values: list[Tensor]) -> list[Tensor]:
    """Output and gradients, in the order of ``NAMES``."""
    leaves = []
    for value in values:
        # clone() would make dense rows of strided ones
        leaf = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
        leaves.append(leaf.requires_grad_())
    zxbcdt, weight, bias, dt_bias, log_a, d = leaves
    y = kernel(zxbcdt, weight, bias, dt_bias.float(), -torch.exp(log_a), D=d, chunk_size=32, activation="silu",
               headdim=case.head_dim, ngroups=case.groups, norm_before_gate=False)  # fmt: skip
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def scans(cases: dict[str, Case]) -> Iterator[tuple[str, float]]:
    for title, case in cases.items():
        values = tensors(case)
        found = scan(ssd_combined.mamba_split_conv1d_scan_combined, case, values)
        expected = scan(ssd.mamba_split_conv1d_scan_combined, case, [v.float() for v in values])
        for name, ours, theirs in zip(NAMES, expected, found, strict=True):
            yield f"{title}: {name}", relative(theirs, ours)


def cut() -> Iterator[tuple[str, float]]:
    """The first heads of every group, cut out, give what they give beside the others: of the kernels alone."""
    whole = Case(heads=6, length=37)
    part = replace(whole, heads=4)
    heads = torch.tensor([0, 1, 3, 4])
    channels = (heads[:, None] * whole.head_dim + torch.arange(whole.head_dim)).flatten()
    inner, states = whole.heads * whole.head_dim, 2 * whole.groups * whole.state
    shared = torch.arange(states)
    convolved = torch.cat([channels, inner + shared])
    columns = torch.cat([channels, inner + convolved, 2 * inner + states + heads])
    zxbcdt, weight, bias, *per_head = tensors(whole)
    values = [zxbcdt[..., columns], weight[convolved], bias[convolved], *(t[heads] for t in per_head)]
    kernel = ssd_combined.mamba_split_conv1d_scan_combined
    yield (
        "cut heads",
        relative(scan(kernel, part, values)[0], scan(kernel, whole, tensors(whole))[0][..., channels]),
    )


def norms() -> Iterator[tuple[str, float]]:
    for width, group, extra, gated in ((32, 16, 0, False), (48, 24, 0, True), (48, 24, 16, True)):
        options: dict[str, Any] = {"eps": 1e-5, "group_size": group, "norm_before_gate": False}
        modules = layernorm_gated.RMSNorm(width, **options), ssd.RMSNormGated(width, **options)
        generator = torch.Generator().manual_seed(width)
        weight, x, z = (
            torch.randn(*s, generator=generator) for s in ((width,), *2 * ((7, 2, width + extra),))
        )
        results = []
        for module in modules:
            module.weight.data.copy_(weight)
            leaves = [t.clone()[..., :width].detach().requires_grad_() for t in (x, z)]
            y = module(leaves[0], leaves[1] if gated else None)
            y.backward(torch.arange(width).expand_as(y).float())
            results.append([y.detach(), module.weight.grad, *(t.grad for t in leaves if t.grad is not None)])
        for name, theirs, ours in zip(("y", "weight", "x", "z"), *results, strict=False):
            yield (
                f"norm of {width} in groups of {group}, {extra} between rows: {name}",
                relative(theirs, ours),
            )


def launches() -> Iterator[tuple[str, int]]:
    """Kernels of one scan and one norm, forward and backward."""
    interpreter.launched.clear()
    scan(ssd_combined.mamba_split_conv1d_scan_combined, Case(), tensors(Case()))
    norm, x = layernorm_gated.RMSNorm(32, group_size=16, norm_before_gate=False), torch.randn(4, 32)
    norm(x.requires_grad_()).sum().backward()
    yield from interpreter.launched.items()


PARTS: dict[str, Callable[[], Iterator[tuple[str, float]]]] = {
    "scans": lambda: scans(FEW),
    "more scans": lambda: scans(MANY),
    "cut": cut,
    "norms": norms,
    "launches": launches,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({part: dict(PARTS[part]()) for part in sys.argv[1:]}))
