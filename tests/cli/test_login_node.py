"""The commands that people type on a login node answer at once and without torch.

At once: within a few times the CPU time of an interpreter that only imports pydantic and yaml, measured beside it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_megatron.recipe import load, load_jobs
from elastic_megatron.space import ParentShape

RECIPES = Path(__file__).parents[2] / "recipes"
# how often the time of BARE a command may take; twice what the slowest takes, so that a busy machine passes
LIMIT = 8.0
BARE = "import pydantic.main, yaml"
HEAVY = ("torch", "megatron", "transformers", "numpy", "matplotlib", "tensorboard")
# what the command has imported is told on a file descriptor of its own
PROGRAM = f"""
import sys
from elastic_megatron.cli import main
status = main(sys.argv[1:])
print("loaded:", *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[str]]:
    """Overrides of a chain or recipe that put a published model's description where its `model.hf` leads."""

    def overrides(source: Path) -> list[str]:
        sizes = load(source.parent / "plan.yaml").model.sizes
        assert sizes is not None
        folder = tmp_path_factory.mktemp("model")
        config = {"model_type": "nemotron_h", **ParentShape(**sizes.model_dump()).to_hf()}
        (folder / "config.json").write_text(json.dumps(config))
        chain = load_jobs(source)
        prefixes = [
            f"{job.name}." if len(chain.jobs) > 1 else "" for job in chain.jobs if job.recipe.model.hf
        ]
        return [f"{prefix}model.hf={folder}" for prefix in prefixes]

    return overrides


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A command in a process of its own, on a machine without Slurm, with its byte code at hand as after a first run."""
    cache = tmp_path_factory.mktemp("bytecode")
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "ELASTIC_MEGATRON_DEBUG")
    }
    environment |= {
        "PYTHONPYCACHEPREFIX": str(cache),
        "PATH": str(Path(sys.executable).parent),
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments: str, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)

    run(program=BARE)
    for command in (["recipe", "show"], ["plan"], ["submit", "--dry-run"]):
        run(*command, str(RECIPES / "tiny_cpu/chain.yaml"))
    return run


def timed[Result](call: Callable[[], Result]) -> tuple[Result, float]:
    """What a call returns, and the CPU seconds of the processes it started and waited for."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    return call(), spent() - before


CHAINS = sorted(RECIPES.glob("*/chain.yaml"))
ALONE = [RECIPES / "tiny_cpu/parent.yaml", RECIPES / "nemotron3_nano_30b/plan.yaml"]


@pytest.mark.parametrize("command", ["recipe show", "plan", "submit --dry-run"])
@pytest.mark.parametrize("source", [*CHAINS, *ALONE], ids=lambda path: str(path.relative_to(RECIPES)))
def test_command_is_quick_and_needs_no_torch(
    run: Callable[..., subprocess.CompletedProcess[str]],
    models: Callable[[Path], list[str]],
    command: str,
    source: Path,
) -> None:
    """Data and weights are elsewhere, so a dry run also complains about them; it prints all files before."""
    published = source.parent.name != "tiny_cpu"
    arguments = [*command.split(), str(source), *(models(source) if published else [])]
    best = bare = float("inf")
    for _ in range(5):
        bare = min(bare, timed(lambda: run(program=BARE))[1])
        done, seconds = timed(lambda: run(*arguments))
        best = min(best, seconds)
        if best <= LIMIT * bare:
            break
    assert done.returncode in ((0, 2) if command.startswith("submit") else (0,)), done.stderr
    assert "Traceback" not in done.stderr and len(done.stdout) > 500, done.stderr
    assert done.stderr.splitlines()[-1] == "loaded:"
    assert best <= LIMIT * bare


def test_there_are_chains() -> None:
    assert {path.parent.name for path in CHAINS} >= {"tiny_cpu", "nemotron3_nano_30b"}
