"""A run folder with values of any kind in it gives a page, or one line that names the file; never a traceback."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_megatron.errors import UserError
from elastic_megatron.report.console import family_table, router_table
from elastic_megatron.report.kinds import LINE, misfit
from elastic_megatron.report.page import render, write_report
from elastic_megatron.report.read import read_run

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**63, 10**39, 1.5, -0.5, float("nan"), float("inf"), 1e300, "", "x", "a\0b", "x" * 3000, [], [1],
    ["a"], [[]], [[[0.5]]], {}, {"a": 1}, {"a": {"b": None}}, [0.5, "a", None], [[0.5], [0.5, 0.5]],
)  # fmt: skip


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    return [at, *(place for key, each in inner for place in _places(each, (*at, key)))]


def _changed(draw: random.Random, text: str) -> str:
    """A JSON text with one value replaced, removed or renamed."""
    data = json.loads(text)
    *way, last = draw.choice(_places(data)[1:])
    owner = data
    for key in way:
        owner = owner[key]
    if draw.random() < 0.15:
        del owner[last]
    elif draw.random() < 0.15 and isinstance(owner, dict):
        owner[draw.choice(("", "x" * 300, "<b>"))] = owner.pop(last)
    else:
        owner[last] = draw.choice(ODD)
    return json.dumps(data)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, write_folder: Callable[[Path], Path]) -> Path:
    """A run folder with few lines, so that a page takes milliseconds."""
    folder = write_folder(tmp_path_factory.mktemp("run"))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    events = [line for line in lines if '"step_ms"' not in line]
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:5], *events[:3], *events[-3:]]))
    (folder / "ranking.safetensors").unlink()
    return folder


def test_a_value_of_another_kind_is_named_or_left_out(small: Path) -> None:
    """200 replaced values of ``report.json`` and of lines: the page is drawn, or one line names the file and the key."""
    report, metrics = (small / "report.json").read_text(), (small / "metrics.jsonl").read_text()
    draw, refused, dropped = random.Random(5), 0, 0
    try:
        for round_ in range(200):
            lines = metrics.splitlines()
            if round_ % 2:
                (small / "report.json").write_text(_changed(draw, report))
            else:
                line = draw.randrange(len(lines))
                lines[line] = _changed(draw, lines[line])
            (small / "metrics.jsonl").write_text("\n".join(lines))
            try:
                run = read_run(small)
            except UserError as e:
                refused += 1
                assert str(small / "report.json") in str(e) and "\n" not in str(e) and len(str(e)) < 600
            else:
                assert render(run)
                assert family_table(run.report) and all(map(router_table, run.routers))
                dropped += run.unreadable_lines
            (small / "report.json").write_text(report)
    finally:
        (small / "metrics.jsonl").write_text(metrics)
    assert refused > 25 and dropped > 25


def _put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda d: (d / name).write_bytes(content)


def _pipe(name: str) -> Callable[[Path], object]:
    def change(d: Path) -> None:
        (d / name).unlink(missing_ok=True)
        os.mkfifo(d / name)

    return change


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no text": (_put("report.json", b'{"name": "\xff"}'), r"report\.json is no valid JSON"),
    "deep": (_put("report.json", b"[" * 100_000), r"report\.json is no valid JSON \(nested too deeply"),
    "piped report": (_pipe("report.json"), r"report\.json is a FIFO"),
    "piped lines": (_pipe("metrics.jsonl"), r"metrics\.jsonl is a FIFO"),
    "piped ranking": (_pipe("ranking.safetensors"), r"ranking\.safetensors is a FIFO"),
    "ranking": (
        _put("ranking.safetensors", b"\x08\0\0\0\0\0\0\0{}      x"),
        r"ranking\.safetensors is not a safetensors",
    ),
    "notes": (_put("ranking.json", b"[]"), r"ranking\.json holds a list"),
}


@pytest.mark.parametrize("bad", BAD)
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, write_folder: Callable[[Path], Path], bad: str
) -> None:
    folder = write_folder(tmp_path / "run")
    change, said = BAD[bad]
    change(folder)
    with pytest.raises(UserError, match=said) as error:
        write_report(folder)
    assert "\n" not in str(error.value)


def test_lines_that_no_run_writes_are_counted(small: Path) -> None:
    whole = read_run(small)
    metrics = (small / "metrics.jsonl").read_text()
    odd = (
        b"[" * 5000,
        b'{"step": ' + b"1" * 5000 + b"}",
        b'{"step": "a"}',
        b"\xff\xfe",
        b"\0",
        b"7",
        b'{"eval": []}',
    )
    (small / "metrics.jsonl").write_bytes(metrics.encode() + b"\n" + b"\n".join(odd))
    found = read_run(small)
    (small / "metrics.jsonl").write_text(metrics)
    assert found.unreadable_lines == len(odd)
    assert found.steps == whole.steps


def test_layers_of_one_axis_have_as_many_choices() -> None:
    def line(probs: Any) -> dict[str, Any]:
        return {"router": {"step": 1, "budgets": {"half": {"probs": {"hidden_size": probs}}}}}

    for good in ([0.5, 0.5], [[0.5, 0.5], [1.0, 0.0]]):
        assert misfit(line(good), LINE) is None
    for bad in ([[0.5, 0.5], [1.0]], [], [[]], [0.5, [0.5]], [2.0], ["a"]):
        assert "probs.hidden_size is a list of" in str(misfit(line(bad), LINE, "line"))
