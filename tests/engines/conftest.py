"""``--engine-results FILE`` keeps what the engines' tests found, from which tools/engines_table.py writes its table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--engine-results", type=Path, metavar="FILE", help="write what engines computed")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str, str, float | str], None]]:
    """Notes the largest difference of log-probabilities by (engine, family, kind of directory), or what the engine says."""
    file: Path | None = request.config.getoption("--engine-results", None)
    found: list[dict[str, str | float]] = []

    def note(engine: str, family: str, kind: str, difference: float | str) -> None:
        found.append({"engine": engine, "family": family, "kind": kind, "difference": difference})

    yield note
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n")
