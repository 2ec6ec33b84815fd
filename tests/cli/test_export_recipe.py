"""``export RECIPE``: all directories of a recipe in one pass, as often as a scheduler starts it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_story import SUBMODELS, Story, done, refused, run, snapshot

from elastic_megatron.conversion import hf_target

RECIPE = """
name: export
job: export
run_dir: run
model: {{checkpoint: {checkpoint}}}
export:
  elastic: out/elastic_hf
  slices: out/slices
  submodels: [large, medium, small]
"""


@pytest.fixture
def recipe(story: Story, tmp_path: Path) -> Path:
    path = tmp_path / "export.yaml"
    path.write_text(RECIPE.format(checkpoint=story.elastic))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def places(out: Path) -> list[Path]:
    return [out / "elastic_hf", *(out / "slices" / name for name in SUBMODELS)]


def content(directory: Path) -> dict[str, str]:
    """Digests by name inside the directory."""
    return {str(Path(f).relative_to(directory)): digest for f, digest in snapshot(directory).items()}


def identity(*directories: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file: equal only if nothing was written again."""
    return {str(f): (f.stat().st_ino, f.stat().st_mtime_ns) for d in directories for f in d.rglob("*")}


def test_one_pass_writes_what_single_commands_write(story: Story, recipe: Path, out: Path) -> None:
    ran = done("export", recipe, "--json").json
    assert ran["written"] == [str(place) for place in places(out)] and ran["kept"] == []
    assert ran["verified"] is True
    assert content(out / "elastic_hf") == content(story.root / "elastic_hf")
    for name in SUBMODELS:
        ours, theirs = content(out / "slices" / name), content(story.slice(name))
        assert ours == theirs, name


def test_a_complete_export_is_left_as_it_is(recipe: Path, out: Path) -> None:
    done("export", recipe)
    before = identity(out)
    ran = done("export", recipe, "--json").json
    assert (ran["written"], ran["kept"]) == ([], [str(place) for place in places(out)])
    assert done("export", recipe).out.splitlines() == [f"{place} is there already" for place in places(out)]
    assert identity(out) == before


def test_what_is_missing_is_written_and_nothing_else(story: Story, recipe: Path, out: Path) -> None:
    done("export", recipe, "export.elastic=")
    kept = places(out)[2:]
    before = identity(*kept)
    shutil.rmtree(out / "slices" / "large")
    ran = done("export", recipe, "export.verify=false", "--json").json
    assert ran["written"] == [str(out / "elastic_hf"), str(out / "slices" / "large")]
    assert ran["kept"] == [str(place) for place in kept] and ran["verified"] is False
    assert identity(*kept) == before
    assert content(out / "slices" / "large") == content(story.slice("large"))


def test_a_job_that_died_is_started_again_and_finishes(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between two directories that get their names: one has it, the others do not."""
    replace = Path.replace

    def die_after_two(self: Path, target: Path) -> Path:
        moved = replace(self, target)
        if Path(target) == out / "slices" / "large":
            raise MemoryError
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die_after_two)
        assert run("export", recipe).status == 1
    assert [place.exists() for place in places(out)] == [True, True, False, False]
    ran = done("export", recipe, "--json").json
    assert [Path(p) for p in ran["kept"]] == places(out)[:2]
    assert [Path(p) for p in ran["written"]] == places(out)[2:]
    assert not list(out.rglob("*.incomplete"))


def test_what_was_never_written_is_not_taken_for_written(
    story: Story, recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that failed leaves no claim on the places: who fills one afterwards keeps it."""

    def fail(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(hf_target, "copy", fail)
        assert run("export", recipe).status == 1
    done("export", story.elastic, out / "elastic_hf", "--elastic")
    before = content(out)
    [line] = refused("export", recipe)
    assert line == (
        f"{out / 'elastic_hf'} holds something that this recipe did not write; remove it, or choose another "
        "destination"
    )
    assert content(out) == before


def test_another_checkpoint_is_not_taken_for_this_one(
    recipe: Path, out: Path, copy: Callable[[str], Path]
) -> None:
    """The same run at an earlier step, with the same configs and names."""
    done("export", recipe)
    earlier = copy("runs/elastic")
    (earlier / "checkpoints/latest_checkpointed_iteration.txt").write_text("8\n")
    before = identity(out)
    [line] = refused("export", recipe, f"model.checkpoint={earlier}")
    assert line.startswith(f"{out / 'elastic_hf'} was exported from another checkpoint, ")
    assert "iter_0000012; remove it" in line
    assert identity(out) == before


def test_a_moved_checkpoint_is_the_same_one(recipe: Path, out: Path, copy: Callable[[str], Path]) -> None:
    done("export", recipe)
    ran = done("export", recipe, f"model.checkpoint={copy('runs/elastic')}", "--json").json
    assert len(ran["kept"]) == 4


def test_other_settings_are_told(recipe: Path, out: Path) -> None:
    done("export", recipe, "export.submodels=[small]", "export.elastic=")
    [line] = refused("export", recipe, "export.dtype=bf16")
    assert line.startswith(f"{out / 'slices/small'} was exported with dtype None instead of bf16; ")
    [line] = refused("export", recipe, "export.plain_order=true")
    assert line.startswith(f"{out / 'slices/small'} was exported with plain_order False instead of True; ")


def test_settings_reach_the_directories(story: Story, recipe: Path, out: Path, tmp_path: Path) -> None:
    small = ["export.elastic=", "export.submodels=[small]"]
    done("export", recipe, *small, "export.dtype=bf16", "--max-shard-size", "30KB")
    assert json.loads((out / "slices/small/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert len(list((out / "slices/small").glob("*.safetensors"))) > 1
    done("export", recipe, *small, f"export.slices={tmp_path / 'plain'}", "export.plain_order=true")
    done("export", story.elastic, tmp_path / "same", "--submodel", "small", "--plain-order")
    assert content(tmp_path / "plain/small") == content(tmp_path / "same") != content(story.slice("small"))


BAD: dict[str, tuple[list[str], str]] = {
    "no section": (
        ["export=", "job=train"],
        "the recipe has no export, so there is nothing to export; add it",
    ),
    "no checkpoint": (
        ["model={hf: x}", "job=train"],
        "the recipe has no model.checkpoint, so there is nothing to export; add it",
    ),
    "a flag of checkpoints": (
        ["--elastic"],
        "--elastic is for checkpoints; in a recipe write it into export",
    ),
    "another one": (["--plain-order"], "--plain-order is for checkpoints; in a recipe write it into export"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(recipe: Path, out: Path, case: str) -> None:
    arguments, message = BAD[case]
    assert refused("export", recipe, *arguments) == [message]
    assert not out.exists()


def test_an_unknown_submodel_is_told_before_anything_is_written(recipe: Path, out: Path) -> None:
    [line] = refused("export", recipe, "export.submodels=[small, huge]")
    assert "huge" in line and not list(out.rglob("*.safetensors"))


def test_a_damaged_record_is_told(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/exports.json").write_text("{")
    [line] = refused("export", recipe)
    assert line.startswith(f"{tmp_path / 'run/exports.json'} is no valid JSON (")


def test_a_checkpoint_takes_one_directory(story: Story, tmp_path: Path) -> None:
    assert refused("export", story.elastic, tmp_path / "a", tmp_path / "b") == [
        f"{str(tmp_path / 'b')!r} is too much: export CKPT HF_DIR writes one directory"
    ]
    [line] = refused("export", story.elastic)
    assert line.startswith("the following arguments are required: HF_DIR")
    done("export", story.elastic, "--submodel", "small", tmp_path / "a")  # flags may stand between
    assert content(tmp_path / "a") == content(story.slice("small"))
