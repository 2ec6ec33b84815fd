"""The README keeps its promises: its code runs, its links exist, its table is one that the tool writes."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

from elastic_megatron.cli import build_parser
from elastic_megatron.commands.examples import EXAMPLES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
TOOL = runpy.run_path(str(ROOT / "tools" / "readme_table.py"))
REPORT: dict[str, Any] = {
    "seed": 7,
    "machine": {"cores": 64},
    "data": {"unit": "nats per byte", "eval_tokens": 5000},
    "parent": {"total_params": 2_000_000, "active_params": 800_000, "loss": 1.5},
    "submodels": {
        "whole": {
            "total_params": 2_000_000, "active_params": 800_000, "loss_unsorted_slice": 1.5,
            "loss_sorted_slice": 1.5, "loss_trained": 1.51, "gap_closed": None, "target_cost": 1.0,
            "realised_cost": 1.0, "logits_error": 2.4e-7,
        },
        "half": {
            "total_params": 900_000, "active_params": 410_000, "loss_unsorted_slice": 2.5,
            "loss_sorted_slice": 2.25, "loss_trained": 1.75, "gap_closed": 2 / 3, "target_cost": 0.5,
            "realised_cost": 0.5125, "logits_error": 3.1e-7,
        },
    },
}  # fmt: skip
COLUMNS = (
    r"\w+", r"\d[\d.]* [kMB]", r"\d[\d.]* [kMB]", r"(\d+\.\d %)?", r"(\d+\.\d %)?", r"(\d\.\d{3})?",
    r"(\d\.\d{3})?", r"\d\.\d{3}", r"(-?\d+ %)?", r"(\de-\d\d)?",
)  # fmt: skip


def block(text: str) -> list[str]:
    return text.split(TOOL["BEGIN"] + "\n")[1].split("\n" + TOOL["END"])[0].split("\n")


def is_family_table(lines: list[str]) -> bool:
    """A sentence, an empty line, the tool's headings, a rule, and at least a parent and one submodel."""
    row = re.compile(r"\| " + r" \| ".join(COLUMNS) + r" \|")
    lead, empty, head, rule, *rows = lines
    return (
        re.fullmatch(
            r"Losses in nats per byte on [\d,]+ held-out bytes; seed \d+, data-parallel ranks \d\.", lead
        )
        is not None
        and empty == ""
        and head == "| " + " | ".join(TOOL["HEADINGS"]) + " |"
        and re.fullmatch(r"\| :---( \| ---:){9} \|", rule) is not None
        and len(rows) >= 2
        and rows[0].startswith("| parent |")
        and all(row.fullmatch(line) for line in rows)
    )


def test_the_readme_is_read_in_one_go() -> None:
    """It has room for what a user needs first; tables of tests, layouts and benchmarks are in docs/."""
    assert len(README.encode()) <= 12 << 10
    order = re.findall(r"^## (.*)", README, re.M)
    assert order[:6] == ["Two commands", "A family on SLURM", "Convert", "Quantise", "Serve", "Limits"]


def test_the_family_table_is_one_that_the_tool_writes() -> None:
    assert is_family_table(block(README))


def test_the_tool_writes_the_report_into_the_block_and_nowhere_else(tmp_path: Path) -> None:
    page, report = tmp_path / "page.md", tmp_path / "report.json"
    page.write_text(f"before\n{TOOL['BEGIN']}\nold\n{TOOL['END']}\nafter\n")
    report.write_text(json.dumps(REPORT))
    assert run_tool(report, page) == 0
    lines = block(page.read_text())
    assert is_family_table(lines)
    assert lines[-1] == "| half | 900 k | 410 k | 50.0 % | 51.2 % | 2.500 | 2.250 | 1.750 | 67 % | 3e-07 |"
    assert page.read_text().startswith("before\n") and page.read_text().endswith(f"{TOOL['END']}\nafter\n")


@pytest.mark.parametrize(
    ("report", "page", "says"),
    [
        (None, "{BEGIN}{END}", "run make quickstart"),
        ("{", "{BEGIN}{END}", "no valid JSON"),
        ("{}", "{BEGIN}{END}", "no report.json of the quickstart"),
        (json.dumps(REPORT), "{END}{BEGIN}", "exactly once"),
    ],
)
def test_the_tool_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], report: str | None, page: str, says: str
) -> None:
    target, source = tmp_path / "page.md", tmp_path / "report.json"
    target.write_text(page.format(BEGIN=TOOL["BEGIN"], END=TOOL["END"]))
    if report is not None:
        source.write_text(report)
    before = target.read_text()
    assert run_tool(source, target) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and said.count("\n") == 1
    assert target.read_text() == before


def run_tool(report: Path, page: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["readme_table.py", str(report), "--readme", str(page)])
        return TOOL["main"]()


def test_the_code_is_the_examples() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert code in (ROOT / "examples" / "elastic_forward.py").read_text(encoding="utf-8")


def test_the_example_runs(megatron: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "elastic_forward.py"), run_name="__main__")
    full, small = capsys.readouterr().out.splitlines()
    assert full.startswith("{'hidden_size': 64, 'num_moe_experts': 8}: 175,016 parameters, loss 5.")
    assert small.startswith("{'hidden_size': 32, 'num_moe_experts': 4}: 63,232 parameters, loss 5.")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    paths = re.findall(r"`((?:elastic_megatron|tests|tools|recipes|examples|docs)/[\w./-]*)`", text)
    missing = [p for p in links if not (page.parent / p).exists()] + [
        p for p in paths if not (ROOT / p).exists()
    ]
    assert not missing


def test_every_command_is_in_the_table_and_no_other() -> None:
    table = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    named = {
        command.split()[0] for row in rows for command in re.findall(r"`([^`]+)`", row.replace(r"\|", "or"))
    }
    (commands,) = (a for a in build_parser()._actions if a.dest == "==SUPPRESS==" and a.choices)
    assert named == set(commands.choices)


def test_every_command_says_what_it_does_and_has_an_example_that_it_takes() -> None:
    """Names and options, that is: files need not be there."""
    parser = build_parser()
    (commands,) = (a for a in parser._actions if a.dest == "==SUPPRESS==" and a.choices)
    assert EXAMPLES.keys() == set(commands.choices)
    for name, command in commands.choices.items():
        program, *arguments = shlex.split(EXAMPLES[name])
        assert program == "elastic-megatron" and arguments[0] == name
        parser.parse_args(arguments)
        shown = command.format_help()
        assert command.description and "example: elastic-megatron" in shown
    for recipe in {
        word for line in EXAMPLES.values() for word in line.split() if word.startswith("recipes/")
    }:
        assert (ROOT / recipe).exists() or recipe.endswith("mine.yaml")
