"""What a run says of quantisation equals what its lines and its checkpoint say."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from quantised_dirs import SHAPE
from quantized_runs import (
    STATES,
    UNSEEN,
    before_training,
    eval_line,
    manifest,
    steps,
    write_checkpoint,
    write_lines,
)
from rich.console import Console
from test_page import Page

from elastic_megatron.checkpoint.stored import model_tensors
from elastic_megatron.cost import account
from elastic_megatron.errors import UserError
from elastic_megatron.report import write_report
from elastic_megatron.report.console import quantized_table
from elastic_megatron.report.quantized import kept_words, recovered
from elastic_megatron.report.read import read_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that was quantised and distilled to the end."""
    write_lines(tmp_path, before_training() + steps())
    write_checkpoint(tmp_path, manifest())
    return tmp_path


def facts(folder: Path) -> dict[str, Any]:
    write_report(folder)
    return json.loads((folder / "report.json").read_text())["quantized"]


def rows(folder: Path) -> list[list[str]]:
    """The first table of the page, without its head."""
    return Page(write_report(folder).read_text(encoding="utf-8")).tables[0]


def printed(folder: Path, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(quantized_table(folder))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_report_json_has_every_state_of_every_submodel(folder: Path) -> None:
    known = facts(folder)
    assert known["format"] == "nvfp4" and known["unquantised_weights"] == "fp32"
    assert known["calibration"] == {"tokens": 8192, "unseen": UNSEEN}
    assert list(known["submodels"]) == list(STATES)
    for name, states in STATES.items():
        m = known["submodels"][name]
        for key, (loss, kl) in zip(("unquantised", "ptq", "qad"), states, strict=True):
            assert m[key] == pytest.approx({"loss": loss, "kl": kl})
    changes = {n: (m["loss_change_ptq"], m["loss_change_qad"]) for n, m in known["submodels"].items()}
    assert changes["whole"] == pytest.approx((0.05, 0.01))
    assert changes["smallest"] == pytest.approx((0.1, 0.2))


def test_recovered_is_the_share_of_the_lost_kl_and_may_be_negative(folder: Path) -> None:
    got = {name: m["kl_recovered"] for name, m in facts(folder)["submodels"].items()}
    assert got == pytest.approx({"whole": 0.75, "middle": 0.75, "smallest": -0.5})
    assert recovered(0.1, 0.1, 0.05) is None, "nothing was lost"
    assert recovered(0.2, 0.1, 0.05) is None
    assert recovered(None, 0.1, 0.05) is None and recovered(0.0, float("nan"), 0.1) is None


def test_bytes_are_those_of_the_directories(folder: Path) -> None:
    """Unquantised: 2 a value, but 4 for what exports keep in fp32; quantised: the experts are most of it."""
    described = manifest()
    assert described.space is not None
    sizes = {name: m["bytes"] for name, m in facts(folder)["submodels"].items()}
    for name, spec in described.submodels.items():
        half = account(described.space, spec).weights_bytes["bf16"]
        assert half < sizes[name]["unquantised"] < 1.05 * half
        assert 0.25 * half < sizes[name]["quantised"] < 0.6 * half
    kept_fp32 = ("A_log", "mixer.D", "dt_bias", "expert_bias", "router.weight")
    exact = sum(math.prod(t.shape) * (4 if t.name.endswith(kept_fp32) else 2) for t in model_tensors(SHAPE))
    assert sizes["whole"]["unquantised"] == exact


def test_page_shows_what_report_json_says(folder: Path) -> None:
    known = facts(folder)
    head, *body = rows(folder)
    assert head[1:4] == ["Loss, FP32", "Loss, PTQ", "Loss, QAD"] and head[-1] == "On disk, BF16 → NVFP4"
    assert [row[0] for row in body] == list(STATES)
    shown = dict(zip(head, body[1], strict=True))
    assert shown["Loss, FP32"] == "2.4000"
    assert shown["Loss, PTQ"] == "2.7000 +12.50 %" and shown["Loss, QAD"] == "2.4500 +2.08 %"
    assert (shown["KL, FP32"], shown["KL, PTQ"], shown["KL, QAD"]) == ("0.3000", "0.5000", "0.3500")
    assert shown["Lost KL recovered"] == "75 %"
    stored = known["submodels"]["middle"]["bytes"]
    words = [f"{stored[key] / 1e3:.3g} kB" for key in ("unquantised", "quantised")]
    assert [re.sub(r"\.0 ", " ", part) for part in shown[head[-1]].split(" → ")] == words


def test_page_tells_calibration_and_what_was_left_alone(folder: Path) -> None:
    source = write_report(folder).read_text(encoding="utf-8")
    page = Page(source)
    assert "quantized" in page.ids and len(page.ids) == len(set(page.ids)) and page.unnamed_pictures == 0
    assert "8.19 k" in source and "decoder.layers.1: 3, 7" in source
    assert "attention; Mamba 2; embeddings; head; convolutions; norms; expert routers" in source
    assert "<p>An expert that calibration met" in source
    assert all(address.startswith(("#", "data:")) for address in page.addresses)


@pytest.mark.parametrize(
    ("kl", "told"), [(0.8, "Distillation won back 50 % or more of the KL that quantisation cost."), (1.2, "")]
)
def test_summary_tells_the_least_that_was_won_back(folder: Path, kl: float, told: str) -> None:
    """Nothing, where a submodel became worse."""
    last = eval_line(50, "nvfp4", 2)
    last["eval"]["submodels"]["smallest"]["kl"] = kl
    write_lines(folder, [*before_training(), *steps(), last])
    words = f"NVFP4 for 3 nested sizes that share one checkpoint. {told}".strip()
    assert f'<p class="summary">{words}</p>' in write_report(folder).read_text(encoding="utf-8")


def test_curves_start_at_ptq_and_carry_both_levels(folder: Path) -> None:
    source = write_report(folder).read_text(encoding="utf-8")
    for name, ((_, before), (_, ptq), (_, qad)) in STATES.items():
        chart = re.search(
            rf'<svg[^>]*aria-label="KL of {name} to the teacher\. [^"]*"[^>]*>.*?</svg>', source
        )
        assert chart is not None
        text = chart[0].replace("&quot;", '"')
        points = json.loads(text[text.index('{"box"') : text.index("]}]}") + 4])["lines"][0]["points"]
        assert [x for _, _, x, _ in points] == ["0", "1 k", "2 k", "3 k", "4 k"]
        assert float(points[0][3]) == pytest.approx(ptq) and float(points[-1][3]) == pytest.approx(qad)
        levels = {
            m[1]: float(m[0]) for m in re.findall(r'y1="([\d.]+)" y2="[\d.]+" class="level (\w+)"', chart[0])
        }
        top, bottom = points[0][1], levels["parent"]
        assert levels["ink"] == pytest.approx(top, abs=0.1), "PTQ is where the curve begins"
        at_end = top + (points[-1][1] - top)
        assert (at_end - top) / (bottom - top) == pytest.approx((ptq - qad) / (ptq - before), abs=0.01)


def test_terminal_table_has_three_rows_a_submodel(folder: Path) -> None:
    lines = printed(folder).splitlines()
    middle = next(i for i, line in enumerate(lines) if line.split()[:1] == ["middle"])
    states = [line.split() for line in lines[middle : middle + 3]]
    assert states[0][:3] == ["middle", "FP32", "2.4000"]
    assert states[1][:5] == ["PTQ", "2.7000", "+12.50", "%", "0.5000"]
    assert states[2][:7] == ["QAD", "2.4500", "+2.08", "%", "0.3500", "75", "%"]
    text = " ".join(" ".join(lines).split())
    assert "NVFP4" in text and "8.19 k tokens" in text and "decoder.layers.1: 3, 7" in text
    assert "on disk: as an export, BF16 where it is not NVFP4" in text
    assert "Mamba 2, embeddings" in text and max(map(len, printed(folder, 80).splitlines())) <= 80


def test_a_run_that_was_only_quantised_has_no_qad(tmp_path: Path) -> None:
    write_lines(tmp_path, before_training())
    write_checkpoint(tmp_path, manifest(), 0)
    m = facts(tmp_path)["submodels"]["whole"]
    assert m["qad"] is None and m["kl_recovered"] is None and m["loss_change_qad"] is None
    assert m["loss_change_ptq"] == pytest.approx(0.05) and m["bytes"]["quantised"] > 0
    assert "Loss, QAD" not in rows(tmp_path)[0] and "QAD" not in printed(tmp_path)
    assert "KL to the teacher" not in re.findall(r"<h3>(.*?)</h3>", (tmp_path / "report.html").read_text())


@pytest.mark.parametrize("n", [1, 2])
def test_a_run_killed_before_it_was_quantised_still_has_a_page(tmp_path: Path, n: int) -> None:
    write_lines(tmp_path, before_training()[:n])
    assert facts(tmp_path)["format"] is None
    assert rows(tmp_path)[1][0] == "whole" and "FP32" in printed(tmp_path)


def test_the_last_of_lines_written_twice_holds(tmp_path: Path) -> None:
    again = eval_line(0, "nvfp4", 1)
    again["eval"]["submodels"]["whole"]["loss"] = 2.3
    write_lines(
        tmp_path,
        [*before_training(), eval_line(10, "nvfp4", 2, 0.1), *before_training()[:2], again, *steps()],
    )
    m = facts(tmp_path)["submodels"]["whole"]
    assert m["ptq"]["loss"] == 2.3 and m["qad"]["loss"] == pytest.approx(2.02)
    assert [line["step"] for line in read_run(tmp_path).evals] == [0, 10, 20, 30, 40]


def test_evaluations_over_the_run_are_of_quantised_weights_alone(tmp_path: Path) -> None:
    """Both kinds have a line of step 0, in any order where a run was restarted; one is a point of the curves."""
    again = eval_line(0, "fp32", 0)
    again["eval"]["submodels"]["whole"]["loss"] = 1.9
    write_lines(tmp_path, [*before_training(), again])
    run = read_run(tmp_path)
    assert [line["weights"] for line in run.evals] == ["nvfp4"]
    assert run.quantized is not None
    assert run.quantized.facts()["submodels"]["whole"]["unquantised"]["loss"] == 1.9


def test_report_json_keeps_what_others_wrote(folder: Path) -> None:
    (folder / "report.json").write_text('{"name": "mine", "quantized": {"format": "fp8"}}')
    facts(folder)
    known = json.loads((folder / "report.json").read_text())
    assert known["name"] == "mine" and known["quantized"]["format"] == "nvfp4"


def test_a_page_elsewhere_leaves_the_run_folder_alone(folder: Path, tmp_path: Path) -> None:
    before = sorted(folder.rglob("*"))
    write_report(folder, out=tmp_path.parent / f"{tmp_path.name}.html")
    quantized_table(folder)
    assert sorted(folder.rglob("*")) == before


def test_ordinary_runs_say_nothing_of_quantisation(run_dir: Path) -> None:
    before = (run_dir / "report.json").read_text()
    page = Page(write_report(run_dir).read_text(encoding="utf-8"))
    assert "quantized" not in page.ids and quantized_table(run_dir) is None
    assert (run_dir / "report.json").read_text() == before


def test_a_run_without_a_teacher_has_losses_only(tmp_path: Path) -> None:
    lines = before_training() + steps()
    for line in lines:
        for found in line.get("eval", {}).get("submodels", {}).values():
            del found["kl"]
    write_lines(tmp_path, lines)
    m = facts(tmp_path)["submodels"]["whole"]
    assert m["kl_recovered"] is None and m["qad"]["kl"] is None
    assert not [title for title in rows(tmp_path)[0] if title.startswith("KL")]


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ((), ("attention", "Mamba 2")),
        (["backbone.layers.0.*"], ("attention", "Mamba 0, 2")),
        (["backbone.layers.*.mixer.in_proj", "backbone.layers.*.mixer.out_proj"], ("attention", "Mamba")),
        (["backbone.layers.0.mixer.in_proj"], ("attention", "Mamba 2", "1 of 2 linears of Mamba 0")),
        (["*.experts.3.up_proj"], ("attention", "Mamba 2", "1 of 16 linears of experts 1", "1 of 16 linears of experts 4")),
        (["*.shared_experts.*", "backbone.layers.5.*"], ("attention", "Mamba 2", "FFN", "shared experts")),
    ],
)  # fmt: skip
def test_what_is_left_alone_in_words(keep: list[str], words: tuple[str, ...]) -> None:
    how = manifest(keep=keep).quantised
    assert how is not None
    assert kept_words(how, SHAPE) == (*words, "embeddings", "head", "convolutions", "norms", "expert routers")


def test_a_damaged_checkpoint_is_told_in_one_line(folder: Path) -> None:
    (folder / "checkpoints" / "iter_0000040" / "elastic.json").write_text("{")
    with pytest.raises(UserError, match=r"elastic\.json"):
        write_report(folder)
