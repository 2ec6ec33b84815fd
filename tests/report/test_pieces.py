"""Numbers, scales, smoothing, terminal tables, ranking plots and the command."""

import argparse
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from elastic_megatron.errors import UserError
from elastic_megatron.report import format as say
from elastic_megatron.report import svg
from elastic_megatron.report.cli import add_parser
from elastic_megatron.report.console import family_table, router_table
from elastic_megatron.report.curves import smooth
from elastic_megatron.report.family import summary
from elastic_megatron.report.ranking import arrange
from elastic_megatron.report.ranking_plots import plot_ranking
from elastic_megatron.report.read import RunData
from elastic_megatron.report.router import certainty, mean_probabilities


def shown(table: Any) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("value", "words"),
    [(31_577_940_288, "31.6 B"), (1_830_000, "1.83 M"), (999, "999"), (0, "0"), (0.0125, "0.0125")],
)
def test_counts_in_human_units(value: float, words: str) -> None:
    assert say.count(value) == words


@pytest.mark.parametrize(
    ("shown", "tick"), [("2.500", "2.5"), ("2.000", "2"), ("1.50 M", "1.5 M"), ("100 %", "100 %"), ("0", "0")]
)
def test_ticks_lose_only_meaningless_zeros(shown: str, tick: str) -> None:
    assert say.trimmed(shown) == tick


@pytest.mark.parametrize(
    ("seconds", "words"), [(4.06, "4.1 s"), (59.6, "1 min 00 s"), (75, "1 min 15 s"), (7380, "2 h 03 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert say.duration(seconds) == words


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_even_and_inside(low: float, span: float) -> None:
    ticks = svg.nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 6
    assert all(low - span * 1e-6 <= tick <= low + span * (1 + 1e-6) for tick in ticks)
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-3, atol=1e-9)


@given(st.lists(st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=7, max_size=7), min_size=1, max_size=3))
def test_merged_heat_cells_cover_what_single_cells_would(rows: list[list[float]]) -> None:
    import re

    x = svg.Scale(0, 7, 0, 70)
    cells = svg.heat_rows(rows, x, 0, 10, "m0")
    area = 0.0
    for cell in cells:
        found = {k: float(v) for k, v in re.findall(r'(width|fill-opacity)="([\d.]+)"', cell)}
        area += round(found["width"] - 0.15, 1) * found["fill-opacity"]
    assert math.isclose(area, 10 * sum(map(sum, rows)), abs_tol=1e-6)


def test_thinning_keeps_ends_length_and_mean() -> None:
    points = [(float(i), math.sin(i / 50)) for i in range(1000)]
    thin = svg.thin_out(points, 100)
    assert len(thin) == 100 and thin[0] == points[0] and thin[-1] == points[-1]
    assert np.mean([y for _, y in thin]) == pytest.approx(np.mean([y for _, y in points]), abs=0.01)


def test_smoothing_is_the_windowed_mean() -> None:
    rng = np.random.default_rng(0)
    points = [(float(i), float(v)) for i, v in enumerate(rng.normal(size=250))]
    half = 250 // 25 // 2
    for (x, y), i in zip(smooth(points), range(250), strict=True):
        window = [v for _, v in points[max(0, i - half) : i + half + 1]]
        assert x == i and y == pytest.approx(np.mean(window))


def test_router_summaries_average_over_layers() -> None:
    assert mean_probabilities([0.2, 0.8]) == [0.2, 0.8]
    assert mean_probabilities([[1.0, 0.0], [0.5, 0.5]]) == [0.75, 0.25]
    assert certainty([[1.0, 0.0], [0.4, 0.6]]) == pytest.approx(0.8)


def test_ranking_is_arranged_by_axis_and_layer() -> None:
    tensors = {
        "layers.10.mamba_num_heads.score": np.array([1.0, 3.0], dtype=np.float32),
        "layers.2.mamba_num_heads.score": np.array([2.0, 2.0], dtype=np.float32),
        "layers.1.moe_ffn_hidden_size.score": np.array([[1.0, 5.0], [7.0, 3.0]], dtype=np.float32),
        "layers.1.num_moe_experts.tokens": np.array([100, 1]),
        "layers.1.num_moe_experts.order": np.array([0, 1]),
        "num_layers.score": np.array([0.1, 0.2]),
    }
    ranking = arrange(tensors, "MEM", None)
    assert [curve.layer for curve in ranking.curves["mamba_num_heads"]] == [2, 10]
    assert ranking.curves["mamba_num_heads"][1].scores.tolist() == [3.0, 1.0]
    # channels are ranked inside each expert: mean of [5, 1] and [7, 3]
    assert ranking.curves["moe_ffn_hidden_size"][0].scores.tolist() == [6.0, 2.0]
    assert ranking.curves["moe_ffn_hidden_size"][0].kept(0.5) == 0.75
    assert ranking.neglected() == {1: 1}
    assert set(ranking.curves) == {"mamba_num_heads", "moe_ffn_hidden_size"}


def test_plots_are_written_for_every_axis(run_dir: Path, tmp_path: Path) -> None:
    written = plot_ranking(run_dir / "ranking.safetensors", tmp_path / "plots")
    assert {path.stem for path in written} == {
        "hidden_size",
        "moe_ffn_hidden_size",
        "num_moe_experts",
        "mamba_num_heads",
        "num_attention_heads",
        "expert_tokens",
        "num_layers",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    with pytest.raises(UserError, match="run `rank` first"):
        plot_ranking(tmp_path / "none.safetensors", tmp_path)


def test_family_table_in_the_terminal(run_dir: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    words = shown(family_table(report))
    for expected in (
        "nats per byte",
        "parent",
        "medium",
        "1.99 M",
        "1.871",
        "1.468",
        "84 %",
        "33.0 → ",
    ):
        assert expected in words
    assert "small" in shown(family_table({"submodels": {"small": {}}}))


def test_router_table_in_the_terminal(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    words = shown(router_table([line["router"] for line in lines if "router" in line][-1]))
    for expected in (
        "step 1200",
        "temperature 0.05",
        "hidden size",
        "192 (100%)",
        "32–96 (100%)",
        "62.0 %",
    ):
        assert expected in words


def test_report_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    page = tmp_path / "page.html"
    args = parser.parse_args(["report", str(run_dir), "--out", str(page), "--json"])
    assert args.handler(args) == {"report": str(page)}
    assert page.is_file() and capsys.readouterr().out == ""
    args = parser.parse_args(["report", str(run_dir)])
    assert args.handler(args) is None
    assert f"wrote {run_dir / 'report.html'}" in capsys.readouterr().out


def test_the_summary_calls_only_a_nested_family_nested() -> None:
    sizes = {"medium": {"active_params": 5, "widths": {"hidden_size": 96, "num_moe_experts": 8}}}
    for experts, words in ((4, "2 nested sizes"), (12, "2 sizes")):
        small = {"active_params": 3, "widths": {"hidden_size": 64, "num_moe_experts": experts}}
        told = summary(RunData("run", {"submodels": sizes | {"small": small}}))
        assert f"into {words} that share one checkpoint" in told
        line = "Small is not part of medium: it has more (num_moe_experts 12, not 8)."
        assert (line in told) == (experts == 12)
