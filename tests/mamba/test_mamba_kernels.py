"""mamba-ssm's Triton kernels, of which GPUs run the compiled form, compute what this project's torch code computes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    not (HERE.parents[1] / ".tools/mamba_ssm/requirements.txt").exists(),
    reason="mamba-ssm's source package is not here; tests/mamba/install.sh brings it",
)
LIMIT, HALF_LIMIT = 1e-5, 5e-3


def errors(*parts: str) -> dict[str, dict[str, float]]:
    """Relative errors by part and case, of a process of its own: see ``kernel_laws``."""
    done = subprocess.run(
        [sys.executable, str(HERE / "kernel_laws.py"), *parts],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_compute_what_the_scan_in_torch_does() -> None:
    """Scan with convolution and gate, and the gated norm: outputs and all gradients, contiguous and strided; heads that
    are cut out give what they gave beside the others."""
    found = errors("scans", "norms", "cut")
    assert all(found.values()) and max(max(part.values()) for part in found.values()) < LIMIT, found


def test_the_benchmark_of_launches_counts_the_kernels_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE.parents[1] / "tools/benchmarks"))
    ran = errors("launches")["launches"]
    norms = sum(n for name, n in ran.items() if "norm" in name)
    assert sum(ran.values()) - norms == sum(importlib.import_module("paper_kernels").SCAN), ran
    assert norms == 2, ran  # and torch's sum over what blocks found of the weight's gradient


@pytest.mark.slow
def test_kernels_compute_what_the_scan_in_torch_does_at_many_sizes() -> None:
    """Unequal groups, widths that are no powers of two, Nemotron's own, short sequences, half precision."""
    found = errors("more scans")["more scans"]
    bad = {case: e for case, e in found.items() if not e < (HALF_LIMIT if "half" in case else LIMIT)}
    assert found and not bad
