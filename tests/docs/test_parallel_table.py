"""The table of docs/parallelism.md is what the parallel tests proved, and the list of layouts means what it says."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_megatron.recipe.training import Parallel

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "parallel_table.py"))
LAYOUTS, AXES = TOOL["LAYOUTS"], TOOL["AXES"]
BEGIN, END = "<!-- parallelism-table:begin -->", "<!-- parallelism-table:end -->"
PASSED = {layout.name: {"training": True} for layout in LAYOUTS}


def run_tool(results: Path, page: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["parallel_table.py", str(results), "--page", str(page)])
        return TOOL["main"]()


def test_the_page_says_what_the_parallel_tests_proved() -> None:
    page = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    proven = json.loads((ROOT / "docs" / "parallel_results.json").read_text(encoding="utf-8"))
    assert page.split(f"{BEGIN}\n")[1].split(f"\n{END}")[0] == TOOL["render"](proven)


def test_the_tool_writes_a_row_for_each_axis_with_the_layouts_that_set_its_key(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    results.write_text(json.dumps(PASSED | {"CP2": {"training": True, "resume": True}}))
    assert run_tool(results, page) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\nCompared with one process: training ({len(LAYOUTS)} layouts), ")
    assert "resume (1 layouts)" in text and text.endswith(f" |\n{END}\nafter\n")
    rows = {line.split(" | ")[0]: line.split(" | ")[2] for line in text.splitlines() if line.startswith("| ")}
    assert len(rows) == 2 + len(AXES)
    assert rows["| context: `context`"] == "CP2, TP2+SP+CP2 |"
    assert (
        rows["| data"]
        == "EP2, EP2-allgather, DP2, DP2-plain, DP2+overlap, EP4, PP2+DP2, TP2+SP+DP2+overlap |"
    )


@pytest.mark.parametrize(
    ("results", "page", "says"),
    [
        (None, "{BEGIN}{END}", "cannot be read (No such file or directory); run pytest tests/parallel"),
        ("{", "{BEGIN}{END}", "no valid JSON"),
        ("[1]", "{BEGIN}{END}", "no results of the parallel tests"),
        (json.dumps({name: PASSED[name] for name in PASSED if name != "CP2"}), "{BEGIN}{END}", "layout CP2 has no results"),
        (json.dumps(PASSED | {"EP4": {}}), "{BEGIN}{END}", "layout EP4 has no results"),
        (json.dumps(PASSED | {"EP4": {"training": True, "sort": False}}), "{BEGIN}{END}", "layout EP4 failed in sort"),
        (json.dumps(PASSED), "{BEGIN}", "exactly once"),
        (json.dumps(PASSED), "{END}{BEGIN}", "exactly once"),
    ],
)  # fmt: skip
def test_the_tool_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], results: str | None, page: str, says: str
) -> None:
    target, source = tmp_path / "page.md", tmp_path / "results.json"
    target.write_text(page.format(BEGIN=BEGIN, END=END))
    if results is not None:
        source.write_text(results)
    before = target.read_text()
    assert run_tool(source, target) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said and said.count("\n") == 1
    assert target.read_text() == before


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_a_layout_is_a_parallel_section_that_fits_its_world(layout: Any) -> None:
    sizes = Parallel(**layout.parallel, world_size=layout.world)
    model = sizes.tensor * sizes.context * sizes.pipeline
    assert layout.replicas * model == layout.world
    assert layout.world % ((sizes.expert_tensor or sizes.tensor) * sizes.expert * sizes.pipeline) == 0


def test_layouts_have_different_names_and_sections_and_every_axis_is_tested() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
    assert len({(layout.world, json.dumps(layout.parallel, sort_keys=True)) for layout in LAYOUTS}) == len(
        LAYOUTS
    )
    assert all(axis.layouts for axis in AXES)
    keys = {axis.key for axis in AXES} - {None}
    # kernels of expert layers are no axis: tests/blocks/test_expert_kernels.py, tests/te
    assert keys == Parallel.model_fields.keys() - {
            "world_size", "fused_experts", "shared_expert_overlap", "distributed_timeout_minutes",
        }  # fmt: skip


CLAIMS = """
import pytest

@pytest.mark.parametrize("resumed", [1, 2])
@pytest.mark.parametrize("name", ["CP2", "EP4"])
def test_resume(record, name, resumed):
    record(name, "resume")
    assert (name, resumed) != ("EP4", 1)

def test_training(record):
    record("EP4", "training")

def test_skipped(record):
    record("EP4", "ranking")
    pytest.skip("no such machine")

@pytest.fixture
def breaks():
    yield
    raise RuntimeError

def test_teardown(record, breaks):
    record("CP2", "sort")

def test_unknown_layout(record):
    record("CP3", "sort")

@pytest.mark.gpu(99)
def test_many_gpus():
    raise RuntimeError
"""


def test_a_property_is_proven_if_every_test_that_claims_it_passes(tmp_path: Path) -> None:
    """Also where the tests run in a process of pytest-xdist."""
    (tmp_path / "test_claims.py").write_text(CLAIMS)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-n", "1", "-o", "markers=gpu", "-p", "results"]
    command += ["--parallel-results", "found.json"]
    paths = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "parallel"), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | paths,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "\n2 failed, 5 passed, 2 skipped, 1 error in " in done.stdout, done.stdout
    assert "needs 99 CUDA devices, this machine has " in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found == {"CP2": {"resume": True, "sort": False}, "EP4": {"training": True, "resume": False}}
