"""The study of quantised families: what it computes from its runs, and the table that it prints."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "study_quantised.py"))


def line(step: int, kl: float) -> str:
    return json.dumps({"eval": {"step": step, "submodels": {"small": {"loss": 1 + kl, "kl": kl}}}})


def run(folder: Path, *lines: str) -> dict[str, Any]:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return TOOL["_evaluations"](folder)


def test_recovered_is_the_share_of_what_rounding_lost(tmp_path: Path) -> None:
    """By hand: 0.1 unquantised, 0.3 rounded; distilled to 0.2 and 0.26, so a half and a fifth came back; 0.01 by training alone."""
    runs: dict[str, list[dict[str, Any]]] = {"fp8": [], "nvfp4": [], "control": []}
    for seed, end in enumerate((0.2, 0.26)):
        runs["fp8"].append(run(tmp_path / f"fp8-{seed}", line(0, 0.1), line(0, 0.11)))
        lines = (line(0, 0.1), line(0, 0.3), line(5, 0.4), line(9, end))
        runs["nvfp4"].append(run(tmp_path / f"nvfp4-{seed}", *lines))
        runs["control"].append(run(tmp_path / f"control-{seed}", line(9, 0.09)))
    found = TOOL["_summary"](runs)["small"]
    assert found["recovered"] == pytest.approx([0.35, 0.15 * 2**0.5])
    assert found["net"] == pytest.approx([0.30, 0.15 * 2**0.5]), "0.01 of 0.2 less"
    assert found["kl_fp8"] == pytest.approx([0.11, 0])
    assert found["loss_qad"][0] == pytest.approx(1.23)
    assert found["kl_control"][0] == pytest.approx(0.09)
    results = {
        "tokens": 1000, "tokens_distilled": 50, "seeds": 2, "submodels": {"small": found},
        "bytes": {"small": {"unquantised": 2_000_000, "quantised": 500_000}},
    }  # fmt: skip
    *_, loss, kl = TOOL["render"](results)
    assert loss.startswith(
        "| small | loss | 1.100 | 1.110 | 1.300 | 1.230 ± 0.042 |  | 1.090 |  | 2.00 → 0.50 MB |"
    )
    assert "| 0.2300 ± 0.0424 | 35 ± 21 % | 0.0900 | 30 ± 21 % |" in kl
