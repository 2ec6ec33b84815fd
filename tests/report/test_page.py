"""The page says what the run folder says, works without anything else, and leaves out what is missing."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from elastic_megatron.errors import UserError
from elastic_megatron.report import write_report

SECTIONS = {
    "summary",
    "family",
    "widths",
    "pareto",
    "training",
    "router",
    "importance",
    "samples",
    "time",
    "made",
}
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Parses strictly: every tag must close in order. Collects ids, addresses and the family table."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open_tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.unnamed_pictures = 0
        self.feed(source)
        self.close()
        assert self.open_tags == [], f"never closed: {self.open_tags}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        self.addresses += [
            str(v) for k, v in attrs if k in {"src", "href", "action", "data", "poster", "srcset"}
        ]
        if tag == "svg" and not found.get("aria-label") and found.get("aria-hidden") != "true":
            self.unnamed_pictures += 1
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags and self.open_tags.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.tables and ("td" in self.open_tags or "th" in self.open_tags):
            self.tables[-1][-1][-1] += data


def page_of(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def number(shown: str) -> float:
    """Back from human units: ``1.83 M`` → 1830000, ``42 %`` → 0.42."""
    matched = re.match(r"([-+]?[\d.]+) ?([kMBT%]?)", shown)
    assert matched, shown
    return float(matched[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "%": 0.01}[matched[2]]


def test_page_is_well_formed_and_has_every_section(run_dir: Path) -> None:
    page = page_of(run_dir)
    assert set(page.ids) >= SECTIONS
    assert len(page.ids) == len(set(page.ids)), "an id occurs twice"
    assert page.unnamed_pictures == 0


def test_page_needs_nothing_from_outside(run_dir: Path) -> None:
    source = write_report(run_dir).read_text(encoding="utf-8")
    page = Page(source)
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    # the SVG namespace is a name, not an address; nothing else may look like one
    assert re.findall(r"https?://\S+?(?=[\"'<\s])", source) == ["http://www.w3.org/2000/svg"]
    assert "@import" not in source and not re.search(r"url\((?!#)", source)


def test_links_of_the_navigation_lead_to_sections(run_dir: Path) -> None:
    page = page_of(run_dir)
    anchors = {address[1:] for address in page.addresses if address.startswith("#")}
    assert anchors == SECTIONS - {"summary"}


def test_family_table_equals_report_json(run_dir: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    head, parent, *rows = page_of(run_dir).tables[0]
    column = {title: i for i, title in enumerate(head)}
    assert number(parent[column["Trained"]]) == pytest.approx(report["parent"]["loss"], abs=5e-4)
    assert [row[0] for row in rows] == list(report["submodels"])
    for row in rows:
        m = report["submodels"][row[0]]
        whole = report["parent"]["active_params"]
        assert number(row[column["Parameters"]]) == pytest.approx(m["total_params"], rel=5e-3)
        assert number(row[column["Active"]]) == pytest.approx(m["active_params"], rel=5e-3)
        assert number(row[column["Active, of parent"]]) == pytest.approx(m["active_params"] / whole, abs=5e-3)
        for title, key in (
            ("Unsorted slice", "unsorted_slice"),
            ("Sorted slice", "sorted_slice"),
            ("Trained", "trained"),
        ):
            assert number(row[column[title]]) == pytest.approx(m[f"loss_{key}"], abs=5e-4)
        if m["gap_closed"] is None:
            assert row[column["Gap closed"]] == "–"
        else:
            assert number(row[column["Gap closed"]]) == pytest.approx(m["gap_closed"], abs=5e-3)
        target, realised = row[column["Cost: target → realised"]].split(" → ")
        assert number(target) == pytest.approx(m["target_cost"], abs=5e-4)
        assert number(realised) == pytest.approx(m["realised_cost"], abs=5e-4)


def test_width_table_equals_report_json(run_dir: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    head, *rows = page_of(run_dir).tables[1]
    shown = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}
    assert shown["hidden size"] == {
        name: str(m["widths"]["hidden_size"]) for name, m in report["submodels"].items()
    }
    assert shown["expert width"]["small"] == "32–96"


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        (["metrics.jsonl"], {"training", "router"}),
        (["ranking.safetensors", "ranking.json"], {"importance"}),
        (["ranking.json"], set()),
        (["recipe.yaml"], set()),
        (["report.json"], {"family", "widths", "samples"}),
        (
            ["report.json", "metrics.jsonl"],
            {"family", "widths", "pareto", "training", "router", "samples", "time"},
        ),
    ],
)
def test_missing_files_leave_out_exactly_their_sections(
    run_dir: Path, missing: list[str], gone: set[str]
) -> None:
    for name in missing:
        (run_dir / name).unlink()
    page = page_of(run_dir)
    assert set(page.ids) & SECTIONS == SECTIONS - gone
    assert {address for address in page.addresses if address.startswith("#")} == {
        f"#{key}" for key in SECTIONS - gone - {"summary"}
    }


@pytest.mark.parametrize("key", ["parent", "submodels", "phases", "data", "machine", "versions", "command"])
def test_report_json_may_lack_any_key(run_dir: Path, key: str) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    del report[key]
    (run_dir / "report.json").write_text(json.dumps(report))
    assert {"training", "router", "importance", "made"} <= set(page_of(run_dir).ids)


@pytest.mark.parametrize(
    "key", ["total_params", "active_params", "widths", "loss_sorted_slice", "loss_trained", "gap_closed"]
)
def test_a_submodel_may_lack_any_value(run_dir: Path, key: str) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    for m in report["submodels"].values():
        m[key] = None
    (run_dir / "report.json").write_text(json.dumps(report))
    assert "family" in page_of(run_dir).ids


def test_a_line_cut_by_a_crash_and_losses_that_are_not_numbers_are_survived(run_dir: Path) -> None:
    first = {"step": 1, "tokens": 10, "loss": math.nan, "budget": {"full": 2, "small": 1}, "stage": "a"}
    (run_dir / "metrics.jsonl").write_text(json.dumps(first) + '\n{"step": 2, "tok')
    source = write_report(run_dir).read_text(encoding="utf-8")
    Page(source)
    assert "1 line of metrics.jsonl could not be read" in source
    assert not re.search(r"\bnan\b", source.split("<main>")[1].split("<script>")[0])


def test_a_step_logged_again_after_a_restart_counts_once(run_dir: Path) -> None:
    from elastic_megatron.report.read import read_run

    lines = [{"step": s, "tokens": s, "loss": v} for s, v in ((1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0))]
    (run_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [(line["step"], line["loss"]) for line in read_run(run_dir).steps] == [
        (1, 3.0),
        (2, 2.0),
        (3, 1.0),
    ]


def test_text_of_the_run_cannot_become_markup(run_dir: Path) -> None:
    report = json.loads((run_dir / "report.json").read_text())
    report["name"] = "</title><script>x</script>"
    report["submodels"] = {'"><img src=x>': report["submodels"]["full"]}
    (run_dir / "report.json").write_text(json.dumps(report))
    source = write_report(run_dir).read_text(encoding="utf-8")
    Page(source)
    assert source.count("<script>") == 1 and "<img" not in source and "<b>before" not in source


def test_a_report_json_from_elsewhere_and_another_output_path(run_dir: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "report.json"
    shutil.move(run_dir / "report.json", elsewhere)
    path = write_report(run_dir, report_json=elsewhere, out=tmp_path / "new" / "page.html")
    assert path == tmp_path / "new" / "page.html"
    assert "family" in Page(path.read_text(encoding="utf-8")).ids


def test_every_submodel_keeps_its_colour(run_dir: Path) -> None:
    """In bars, cells, lines and marks alike: tips that name a submodel sit on marks of its colour class."""
    source = write_report(run_dir).read_text(encoding="utf-8")
    for colour, name in (("m0", "full"), ("m1", "medium"), ("m2", "small")):
        tips = re.findall(rf'class="[^"]*\b(m\d)" data-tip="{name}\b', source)
        assert len(tips) > 3 and set(tips) == {colour}


def test_bad_folders_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        write_report(tmp_path)
    (tmp_path / "report.json").write_text('{"name": "x"}')
    (tmp_path / "ranking.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="not a safetensors file"):
        write_report(tmp_path)


def test_the_page_tells_of_spikes_steps_without_an_update_and_rewinds(run_dir: Path) -> None:
    """As training writes them: numbers that are not finite are null."""

    def words() -> str:
        return write_report(run_dir).read_text(encoding="utf-8")

    for phrase in ("Loss spikes", "Steps without an update", "went back", ">spike<"):
        assert phrase not in words()
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    steps[39]["spike"] = 8.25
    steps[59] |= {"loss": None, "kd_loss": None, "grad_norm": None, "updated": False, "nonfinite": ["loss"]}
    lines.append(
        {"rewind": {"step": 50, "why": "loss of step 60 not finite", "passed_over": [60], "rewinds": 1}}
    )
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = words()
    for phrase in ("Loss spikes: 40.", "Steps without an update: 60.", "went back to step 50.", ">spike<"):
        assert phrase in found, phrase
