"""mlx-lm computes of exported directories what transformers does."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import NEW, PROMPTS, SHAPES, directories, reference

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".tools" / "engines" / "mlx" / "bin" / "python"
pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no mlx-lm: make engines")
BOUND = 1e-4
# it builds shared experts of width 0, unless n_shared_experts is null, which transformers does not take
REFUSED = {"moe, no shared experts": "ZeroDivisionError: float division by zero"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, dict[str, Any]]]:
    """(family, kind of directory) -> the directory and what mlx-lm says of it."""
    root = tmp_path_factory.mktemp("engines")
    folders = {
        (name, kind): folder
        for name, shape in SHAPES.items()
        for kind, folder in directories(root / name.replace(" ", "_"), shape).items()
    }
    jobs = [{"directory": str(f), "prompts": PROMPTS, "new": NEW} for f in folders.values()]
    ran = subprocess.run(
        [PYTHON, ROOT / "tests/engines/run_mlx.py"], input=json.dumps(jobs), capture_output=True, text=True,
        timeout=300, env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    answers = json.loads(ran.stdout)
    return {
        key: (folder, a | {"version": answers["version"]})
        for (key, folder), a in zip(folders.items(), answers["answers"], strict=True)
    }


@pytest.mark.parametrize("kind", ["elastic directory", "slice"])
@pytest.mark.parametrize("family", SHAPES)
def test_a_directory_is_the_same_model_in_mlx_lm(
    found: dict[tuple[str, str], tuple[Path, dict[str, Any]]],
    family: str,
    kind: str,
    record: Callable[[str, str, str, float | str], None],
) -> None:
    """fp32: log-probabilities of every position within 1e-4, and the same greedy tokens, one by one through its caches.

    What mlx-lm cannot build is known by its words, so that we see when it can.
    """
    folder, theirs = found[family, kind]
    if family in REFUSED:
        record(f"mlx-lm {theirs['version']}", family, kind, theirs["error"])
        assert theirs["error"] == REFUSED[family]
        return
    ours = reference(folder)
    assert min(ours["margin"]) > BOUND, "a tie says nothing"
    pairs = zip(theirs["log_p"], ours["log_p"], strict=True)
    worst = max(float((torch.tensor(mine) - here).abs().max()) for mine, here in pairs)
    record(f"mlx-lm {theirs['version']}", family, kind, worst)
    assert worst < BOUND and theirs["greedy"] == ours["greedy"]
