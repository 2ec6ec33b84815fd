"""Mutation tests: make one mistake at a time in a copy of the package, and see which tests notice.

    python tools/mutate.py [WORD ...]      only mutations whose law, file or mistake contains a word

Writes what it saw into the table of docs/mutations.md. Exits 1 if a mistake was not noticed. The package
itself is never touched: tests run against a copy that stands first on PYTHONPATH.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "mutations.md"
BEGIN, END = "<!-- mutations: written by tools/mutate.py -->", "<!-- end of mutations -->"
SECONDS = 400


class Result(NamedTuple):
    """``failed``: names of tests that failed; empty where nothing did, ``["timeout"]`` where it took too long."""

    failed: list[str]
    seconds: float


def copy_of_package(folder: Path, mutation: Mutation | None) -> None:
    """Copy ``elastic_megatron`` and make the mistake in the copy."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "elastic_megatron", folder / "elastic_megatron", ignore=ignore)
    if mutation is None:
        return
    file = folder / "elastic_megatron" / mutation.file
    text = file.read_text()
    count = text.count(mutation.original)
    if count != 1:
        sys.exit(
            f"error: {mutation.file} has {count} x {mutation.original!r}; bring tools/mutations.py up to date"
        )
    file.write_text(text.replace(mutation.original, mutation.mutated))


def run(tests: str, mutation: Mutation | None) -> Result:
    """Run a selection of tests against the copy; three failures are enough."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder, began = Path(name), time.monotonic()
        copy_of_package(folder, mutation)
        environment = {
            **os.environ,
            "PYTHONPATH": name,
            "PYTHONSAFEPATH": "1",  # else processes that tests start find the package of the working directory
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": str(folder / "hypothesis"),
        }
        pytest = [str(Path(sys.executable).with_name("pytest")), "-q", "--tb=no", "-rfE", "--maxfail=3"]
        where = ["-p", "no:cacheprovider", f"--basetemp={folder / 'tmp'}", *tests.split()]
        try:
            out = subprocess.run(
                [*pytest, *where], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            return Result(["timeout"], time.monotonic() - began)
        failed = re.findall(r"^(?:FAILED|ERROR) \S*?::(\w+(?:\[[^\]]*\])?)", out.stdout, re.MULTILINE)
        if not failed and out.returncode != 0:
            failed = [(out.stdout + out.stderr).strip().splitlines()[-1][:80]]
        return Result(failed, time.monotonic() - began)


def check_copy_is_used() -> None:
    """A mutant that nobody imports would survive everything."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        copy_of_package(Path(name), None)
        code = "import elastic_megatron; print(elastic_megatron.__file__)"
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=name, env={**os.environ, "PYTHONPATH": name},
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert out.stdout.startswith(name), out.stdout


def row(m: Mutation, r: Result) -> str:
    noticed = ", ".join(f"`{t.replace('|', '/')}`" for t in r.failed[:2]) or "**nothing**"
    return f"| {m.law} | {m.mistake} | `{m.file}` | {noticed}{' …' if len(r.failed) > 2 else ''} |"


def write_log(results: Sequence[tuple[Mutation, Result]]) -> None:
    """Replace the rows of these mutations; rows of mutations that no longer exist go."""
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    old, tail = rest.split(END)
    rows = {line.split(" | ")[1]: line for line in old.splitlines() if line.startswith("| ")}
    rows |= {m.mistake: row(m, r) for m, r in results}
    kept = [rows[m.mistake] for m in MUTATIONS if m.mistake in rows]
    lines = ["| law | mistake | where | noticed by |", "|---|---|---|---|", *kept]
    PAGE.write_text("\n".join([f"{head}{BEGIN}", "", *lines, "", f"{END}{tail}"]))


def main(words: Sequence[str]) -> int:
    chosen = [m for m in MUTATIONS if not words or any(w in f"{m.law} {m.file} {m.mistake}" for w in words)]
    check_copy_is_used()
    for tests in sorted({m.tests for m in chosen}):
        if broken := run(tests, None).failed:
            sys.exit(f"error: {tests} fails without any mutation: {', '.join(broken)}; mend that first")
    results = []
    for i, mutation in enumerate(chosen, 1):
        result = run(mutation.tests, mutation)
        results.append((mutation, result))
        verdict = ", ".join(result.failed) or "NOT NOTICED"
        print(
            f"{i}/{len(chosen)} law {mutation.law}: {mutation.mistake}: {verdict} ({result.seconds:.0f} s)",
            flush=True,
        )
    write_log(results)
    return int(any(not r.failed or r.failed == ["timeout"] for _, r in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
