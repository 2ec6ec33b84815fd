"""The page on execution quotes what the benchmarks printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/execution.md").read_text()
QUOTED = {
    "a size with 45 % of the FLOPs, sliced / the same size as a plain Megatron model":
        ("steps", "sliced small / extracted small"),
    "the same, sliced / masked": ("steps", "sliced small / masked small"),
    "the whole model in an elastic run / stock Megatron": ("steps", "sliced full / stock"),
    "three budgets in turn, sliced / masked": ("steps", "sliced / masked, mean of the three budgets"),
    "soft choices, masked / stock Megatron": ("steps", "masked soft / stock"),
    "distillation of 131,072 logits a token, in chunks / ModelOpt on whole logits":
        ("distillation", "chunked / LogitsKLLoss on whole logits"),
    "importance of all axes, REAP included / a forward pass":
        ("ranking", "REAP and the scores of all widths / forward"),
}  # fmt: skip


def measured(benchmark: str, title: str) -> dict[str, Any]:
    results = json.loads((ROOT / f"tools/benchmarks/results/{benchmark}_cpu.json").read_text())
    (row,) = (row for row in results["rows"] if row["title"] == title)
    return row


@pytest.mark.parametrize("label", QUOTED)
def test_a_ratio_is_the_measured_one(label: str) -> None:
    row = measured(*QUOTED[label])
    memory = "" if row["memory"] is None else f"{row['memory']:.2f} "
    assert f"| {label} | {row['ratio']['median']:.2f} | {memory}|" in PAGE


def test_every_ratio_has_a_source() -> None:
    section = PAGE.split("## What a step costs")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(QUOTED)
