"""docs/resume.md says of every key what the code does with it."""

from __future__ import annotations

from pathlib import Path

from elastic_megatron.errors import AGAIN, BAD_INPUT, DIVERGED
from elastic_megatron.recipe.resume import tables

PAGE = (Path(__file__).parents[2] / "docs" / "resume.md").read_text()


def test_the_tables_are_those_of_the_code() -> None:
    assert tables() in PAGE, f"write into docs/resume.md:\n{tables()}"


def test_the_exit_statuses_are_those_of_the_code() -> None:
    for status, words in ((BAD_INPUT, "bad input"), (DIVERGED, "diverged"), (AGAIN, "SIGUSR1")):
        assert [line for line in PAGE.splitlines() if line.startswith(f"| {status} |") and words in line], (
            status
        )
