"""A mistake in what was typed costs one line and no time: no torch, nothing made, nothing left."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from mistakes import MISTAKES, write_folder

LIMIT = 8.0
HEAVY = ("torch", "megatron", "transformers")
# a fork for each call, of a process that has what most commands import: all of it is seen to go without torch
SERVER = f"""
import json, os, sys
from elastic_megatron import cli, preflight, quickstart
from elastic_megatron.commands import arguments
for call in json.load(sys.stdin):
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        for number in (1, 2):
            os.dup2(os.open(f"{{number}}.said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        try:
            status = cli.main(call.split())
        except SystemExit as e:
            status = e.code
        sys.stdout.flush()
        os._exit(99 if any(name in sys.modules for name in {HEAVY}) else status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = [open(f"{{number}}.said", errors="replace").read() for number in (1, 2)]
    [os.unlink(f"{{number}}.said") for number in (1, 2)]
    tree = sorted(os.path.join(at, n) for at, folders, files in os.walk(".") for n in (*folders, *files))
    print(json.dumps([status, *said, tree]))
"""


class Ended(NamedTuple):
    """How a call ended: 99 where it had imported something heavy."""

    status: int
    out: str
    err: str
    tree: list[str]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    without = ("ELASTIC_MEGATRON_DEBUG", "PYTHONDONTWRITEBYTECODE")
    return {k: v for k, v in os.environ.items() if k not in without} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    write_folder(root)
    return root


@pytest.fixture(scope="module")
def ended(folder: Path, environment: dict[str, str]) -> dict[str, Ended]:
    done = subprocess.run(
        [sys.executable, "-c", SERVER], input=json.dumps([*MISTAKES]), capture_output=True, text=True, timeout=300,
        cwd=folder, env=environment, check=True,
    )  # fmt: skip
    return dict(zip(MISTAKES, (Ended(*json.loads(line)) for line in done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("call", MISTAKES)
def test_a_mistake_is_one_line_without_torch_and_leaves_nothing(
    folder: Path, ended: dict[str, Ended], call: str
) -> None:
    """Exit 2, one ``error:`` line that says what and where, and the same tree as before."""
    found = ended[call]
    assert found.status == 2 and found.out == "", found
    [line] = found.err.splitlines()
    assert re.match(f"error: .*{MISTAKES[call]}", line), line
    before = sorted(os.path.join(".", os.path.relpath(path, folder)) for path in folder.rglob("*"))
    assert found.tree == before


@pytest.mark.parametrize("call", ["eval family --text text.txt --submodel smal", "train recipe.yaml"])
def test_a_mistake_takes_no_more_than_starting_up(
    folder: Path, environment: dict[str, str], call: str
) -> None:
    """CPU time, against an interpreter that only imports pydantic and yaml, timed beside it."""

    def spent(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, *arguments], capture_output=True, timeout=120, cwd=folder, env=environment
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    best = bare = float("inf")
    for _ in range(5):
        bare = min(bare, spent("-c", "import pydantic.main, yaml"))
        best = min(best, spent("-m", "elastic_megatron.cli", *call.split()))
        if best <= LIMIT * bare:
            return
    pytest.fail(f"{best} against {bare}")
