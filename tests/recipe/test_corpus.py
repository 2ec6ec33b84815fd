"""Every slip of the corpus through the command line: exit 2, one-line complaints with their place, nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from corpus import Slip, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slips import SLIPS

from elastic_megatron.cli import main
from elastic_megatron.errors import UserError
from elastic_megatron.recipe import load_jobs


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files without a mistake, in the working directory."""
    for name in ("TEAM", "TEAM_DATA", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    return tmp_path


def test_the_corpus_is_large() -> None:
    assert len(SLIPS) >= 200


def test_the_files_are_right_without_a_slip(team: Path) -> None:
    chain = load_jobs("chain.yaml")
    assert [job.name for job in chain.jobs] == ["rank", "stage1", "stage2", "export"]
    assert chain.cluster.gpus_per_node == 8


def complaints(slip: Slip, place: str, text: str) -> list[str]:
    """The lines of stderr without `error: `, after checking that they say what the slip promises."""
    assert text.endswith("\n")
    lines = text.removesuffix("\n").split("\n")
    assert all(line.startswith("error: ") and line.isprintable() for line in lines), text
    lines = [line.removeprefix("error: ") for line in lines]
    [main_line] = [line for line in lines if line.startswith(f"{place}: ") and slip.says in line]
    rest = [line for line in lines if line != main_line]
    assert len(rest) == len(slip.also), rest
    assert all(any(part in line for line in rest) for part in slip.also), rest
    return lines


def some_commands(case: str) -> set[str]:
    """Dry run and one more command, in turn: they read files by the same code, and each sees slips of every group."""
    commands = SLIPS[case].commands
    return {commands[-1], commands[list(SLIPS).index(case) % len(commands)]}


@pytest.mark.parametrize("case", SLIPS)
def test_slip_is_named_with_its_place(
    team: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    slip = SLIPS[case]
    for name, value in slip.environment.items():
        monkeypatch.setenv(name, value)
    place = slip.apply(team)
    before = sorted(team.rglob("*"))
    said = []
    for command in some_commands(case):
        status = main([*command.split(), slip.target, *slip.overrides])
        out, err = capsys.readouterr()
        assert (status, out) == (2, ""), (command, err)
        said.append(complaints(slip, place, err))
    assert said == said[:1] * len(said)
    assert sorted(team.rglob("*")) == before


IN_PROCESSES = (
    "typo: key of a section",
    "value: more than 64 bits",
    "yaml: half of a surrogate pair",
    "yaml: nested without end",
    "file: not UTF-8",
    "override: unknown job",
)


@pytest.mark.parametrize("case", IN_PROCESSES)
def test_slip_in_a_process_of_its_own(team: Path, case: str) -> None:
    """In a locale without UTF-8, as some login nodes have it."""
    slip = SLIPS[case]
    place = slip.apply(team)
    done = subprocess.run(
        [sys.executable, "-m", "elastic_megatron.cli", "submit", "--dry-run", slip.target, *slip.overrides],
        capture_output=True, text=True, timeout=60, env={**os.environ, "LC_ALL": "POSIX", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    complaints(slip, place, done.stderr)


# Slips that keep another file from being read, or are told in another file.
HIDING = {
    "typo: jobs of the chain", "typo: key of a job", "value: list of jobs", "value: file for a job", "value: no recipe",
    "misplaced: a recipe for a cluster file", "misplaced: a cluster file for a recipe", "misplaced: a chain in a chain",
    "misplaced: links without a chain", "misplaced: links above a chain", "variable: not set, file", "variable: in brackets, without quotes",
}  # fmt: skip
TOGETHER = {
    name: slip
    for name, slip in SLIPS.items()
    if name.startswith(("typo: ", "value: ", "secret: ", "variable: ", "misplaced: "))
    and slip.file and slip.old and slip.target == "chain.yaml" and not slip.environment and name not in HIDING
}  # fmt: skip


@pytest.fixture
def alone(team: Path) -> Callable[[str], list[str]]:
    """The complaints about one slip."""
    known: dict[str, list[str]] = {}

    def lines(name: str) -> list[str]:
        if name not in known:
            known[name] = lines_of(team, [name])
        return known[name]

    return lines


def lines_of(team: Path, names: list[str]) -> list[str]:
    write(team)
    for name in names:
        SLIPS[name].apply(team)
    with pytest.raises(UserError) as caught:
        load_jobs("chain.yaml")
    return str(caught.value).splitlines()


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.fixed_dictionaries({}, optional={
    file: st.sampled_from([name for name, slip in TOGETHER.items() if slip.file == file])
    for file in sorted({slip.file for slip in TOGETHER.values()})
}).filter(bool))  # fmt: skip
def test_all_slips_are_told_at_once(
    team: Path, alone: Callable[[str], list[str]], chosen: dict[str, str]
) -> None:
    """One slip in each of some files: together they are told as each is alone."""
    expected = {line for name in chosen.values() for line in alone(name)}
    assert set(lines_of(team, list(chosen.values()))) == expected
