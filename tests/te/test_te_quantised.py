"""Quantised and sliced on Transformer Engine's modules: linears, ranges, numbers and gradients of Megatron's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from standin import SOURCE

pytestmark = pytest.mark.skipif(
    not SOURCE.exists(), reason="Transformer Engine's Python code is not here; tests/te/install.sh brings it"
)
# fp32 throughout, as in test_te_laws; a value that rounding in fp32 moves across a step of a format moves by far more
LIMIT = 5e-5
LINEARS = {"default": 46, "mamba_moe_aggressive": 44, "mamba_moe_conservative": 38}


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    program = Path(__file__).with_name("te_quantised_laws.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_quantised_linears_are_those_of_megatrons_own_modules(found: dict[str, dict[str, Any]]) -> None:
    """[linears, those that only one of both has, enabled quantisers that are none of theirs]."""
    assert found["linears"] == {
        f"{preset} {form}": [count, 0, 0] for preset, count in LINEARS.items() for form in ("fp8", "nvfp4")
    }


def test_sliced_on_fused_modules_is_masked_on_megatrons_own(found: dict[str, dict[str, Any]]) -> None:
    """Logits, gradients and calibrated magnitudes."""
    errors = {name: value for name, value in found["execution"].items() if isinstance(value, float)}
    assert len(errors) == 2 * 5 and max(errors.values()) < LIMIT, errors


def test_grouped_experts_without_a_token_are_named(found: dict[str, dict[str, Any]]) -> None:
    for form in ("fp8", "nvfp4"):
        grouped, apart = found["execution"][f"{form}, experts without a token"]
        assert grouped == apart and 2 in grouped["decoder.layers.1"]


def test_fused_and_grouped_modules_multiply_with_what_is_stored(found: dict[str, dict[str, Any]]) -> None:
    """Bit for bit; [quantised weights of a submodel, those that were multiplied with, those that are not]."""
    counts = [value for name, value in found["execution"].items() if "not what is stored" in name]
    assert len(counts) == 2 * 4 and all(own == seen and not wrong for own, seen, wrong in counts), counts
