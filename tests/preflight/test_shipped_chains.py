"""The shipped chains fit their clusters; only the files of a site are missing. And checking them costs next to nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from chain_files import write_model

from elastic_megatron.preflight.family import Families
from elastic_megatron.preflight.layout import job_problems
from elastic_megatron.preflight.memory import fullest, memory_problems
from elastic_megatron.preflight.runs import shared_runs
from elastic_megatron.preflight.work import time_problems
from elastic_megatron.recipe import JobChain, load, load_jobs
from elastic_megatron.space import ParentShape

RECIPES = Path(__file__).parents[2] / "recipes"
CHAINS = sorted(path for path in RECIPES.glob("*/chain.yaml"))


def shipped(path: Path, folder: Path) -> JobChain:
    """The chain; a parent that has to be downloaded is described by the sizes of ``plan.yaml``."""
    plan = path.with_name("plan.yaml")
    if not plan.exists():
        return load_jobs(path)
    sizes = load(plan).model.sizes
    assert sizes is not None
    model = write_model(folder / path.parent.name, ParentShape.from_dict(sizes.model_dump()))
    return load_jobs(path, [f"rank.model.hf={model}"])


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.parent.name)
def test_a_shipped_chain_fits_its_cluster(path: Path, tmp_path: Path) -> None:
    chain = shipped(path, tmp_path)
    families = Families(chain)
    for job in chain.jobs:
        family = families.of(job)
        for check in (job_problems, memory_problems, time_problems):
            assert list(check(chain, job, family)) == [], job.name
        assert list(shared_runs(chain, job)) == []


def test_there_are_shipped_chains_and_some_name_a_gpu(tmp_path: Path) -> None:
    """Otherwise the test above would say nothing of memory."""
    chains = [shipped(path, tmp_path) for path in CHAINS]
    cards = [chain for chain in chains if chain.cluster.card is not None]
    assert len(chains) >= 3 and len(cards) >= 2
    for chain in cards:
        families = Families(chain)
        assert all(fullest(chain, job, families.of(job)) for job in chain.jobs if job.recipe.job != "export")


@pytest.mark.parametrize("path", CHAINS, ids=lambda path: path.parent.name)
def test_checking_needs_neither_torch_nor_a_second(path: Path) -> None:
    """In CPU seconds of a fresh interpreter; the limit for `submit --dry-run` and `plan` is 0.7."""
    code = f"""
        import sys, time
        from elastic_megatron.errors import UserError
        from elastic_megatron.preflight import preflight
        from elastic_megatron.recipe import load_jobs
        for finding in preflight(load_jobs({str(path)!r})):
            assert "\\n" not in finding.text
        heavy = {{"torch", "megatron", "transformers", "numpy"}} & set(sys.modules)
        assert not heavy, heavy
        print(time.process_time())
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"[0-9.]+", done.stdout.strip()) and float(done.stdout) < 1.0
