"""Megatron's converter flags reach the command that does the work."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from elastic_megatron import cli

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.mark.parametrize(
    ("flags", "command"),
    [
        ("--loader hf --saver core --load-dir a --save-dir b", "import a b"),
        ("--loader core --saver hf --load-dir a --save-dir b", "export a b"),
        ("--loader core --saver hf --load-dir a --save-dir b --elastic", "export a b --elastic"),
        ("--loader core --saver hf --load-dir a --save-dir b --submodel s", "export a b --submodel s"),
        ("--loader hf --saver hf --load-dir a --save-dir b --submodel s --json", "slice a b --submodel s --json"),
    ],
)  # fmt: skip
def test_flags_become_a_command(monkeypatch: pytest.MonkeyPatch, flags: str, command: str) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(cli, "main", lambda argv: seen.append(argv) or 2)
    assert run(monkeypatch, flags) == 2
    assert seen == [command.split()]
    cli.build_parser().parse_args(seen[0])  # exits where the command does not take these


def test_nothing_to_convert_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--loader core --saver core --load-dir a --save-dir b") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1


def run(monkeypatch: pytest.MonkeyPatch, flags: str) -> int:
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *flags.split()])
    return runpy.run_path(str(TOOL))["main"]()
