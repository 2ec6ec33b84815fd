"""A shell that asks gets commands, options and keys of recipes, and no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_megatron.commands.overrides import completed, keys_of
from elastic_megatron.recipe import Recipe, json_schema

ROOT = Path(__file__).parents[2]


def offered(line: str) -> list[str]:
    """What bash is told behind this line, by the protocol of argcomplete (on descriptor 8, which a shell sends to its own)."""
    code = "import sys; from elastic_megatron.cli import main; main()"
    environment = os.environ | {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "COMP_LINE": line, "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_IFS": "\n", "COMP_TYPE": "9", "COMP_WORDBREAKS": " ", "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
    }  # fmt: skip
    ran = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" 8>&1 9>/dev/null', sys.executable, code], env=environment, cwd=ROOT,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return [word.strip() for word in ran.stdout.split("\n") if word]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("elastic-megatron exp", ["export"]),
        ("elastic-megatron slice a b --subm", ["--submodel"]),
        (
            "elastic-megatron train recipes/tiny_cpu/elastic.yaml router.accept",
            ["router.accept_missed_budgets="],
        ),
        ("elastic-megatron submit recipes/tiny_cpu/chain.yaml stage1.optimizer.l", ["stage1.optimizer.lr="]),
        ("elastic-megatron submit recipes/tiny_cpu/chain.yaml cluster.acc", ["cluster.account="]),
    ],
)
def test_a_shell_completes(line: str, words: list[str]) -> None:
    assert offered(line) == words


def test_every_key_of_the_schema_is_offered_and_no_other() -> None:
    keys = keys_of(json_schema(Recipe))
    assert {"seed", "stages.0.tokens", "router.tau.end", "data.train.0.path", "quantize.format"} <= set(keys)
    assert not [key for key in keys if key.endswith(".") or ".." in key or key.startswith("extends")]
    assert all(key.split(".")[0] in json_schema(Recipe)["properties"] for key in keys)
    assert completed("nothing", None) == []  # pyright: ignore[reportArgumentType]
