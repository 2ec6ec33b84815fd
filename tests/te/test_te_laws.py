"""The laws hold on Transformer Engine's modules, whose kernels take pointers: nothing strided ever reaches one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from standin import SOURCE

pytestmark = pytest.mark.skipif(
    not SOURCE.exists(), reason="Transformer Engine's Python code is not here; tests/te/install.sh brings it"
)
# fp32 throughout, of weights scaled up: TE's kernels know no fp64
LIMIT = 5e-5


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    program = Path(__file__).with_name("te_laws.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", ["execution", "ranking", "checkpoints"])
def test_transformer_engine_computes_what_megatrons_own_modules_do(
    errors: dict[str, dict[str, float]], part: str
) -> None:
    """Masked = sliced = recomputed, TE = local; rankings; checkpoints from one to the other. See ``te_laws``."""
    assert errors[part] and max(errors[part].values()) < LIMIT, errors[part]
