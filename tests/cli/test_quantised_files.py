"""``export``, ``slice`` and ``eval`` of a quantised run: what will be served, by its size and its loss."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cli_story import Ran, Story, done, refused, snapshot, tensors

from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.quantization.formats import FORMATS, Format

NAMES = ("whole", "middle", "smallest")
formats = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
RECIPE = """
name: export
job: export
run_dir: run
model: {{checkpoint: {checkpoint}}}
export: {{elastic: out/elastic, slices: out/slices, submodels: [whole, middle, smallest], dtype: bf16}}
"""


@dataclass(frozen=True)
class Files:
    """An elastic directory and its slices, of each format, and the evaluations of all."""

    root: Path
    evals: dict[tuple[str, str], Ran] = field(default_factory=dict)

    def result(self, form: Format, what: str) -> dict[str, dict[str, Any]]:
        return self.evals[form.name, what].json["submodels"]


@pytest.fixture(scope="module")
def files(story: Story, quantised: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    found = Files(tmp_path_factory.mktemp("quantised"))
    for form in FORMATS.values():
        run, root = quantised / form.name, found.root / form.name
        done("export", run, root / "elastic", "--elastic", "--verify")
        several = [part for name in NAMES for part in ("--submodel", name)]
        done("slice", root / "elastic", root / "slices", *several)
        places = {"run": run, "elastic": root / "elastic", **{n: root / "slices" / n for n in NAMES}}
        for what, path in places.items():
            found.evals[form.name, what] = done(
                "eval", path, "--text", story.text, "--seq-length", 64, "--json"
            )
    return found


@formats
def test_run_directory_and_slices_have_the_same_losses(files: Files, form: Format) -> None:
    """A slice sums in another order, and an input at the middle of two values may go to the other one."""
    run, elastic = files.result(form, "run"), files.result(form, "elastic")
    assert [*run] == [*elastic] == [*NAMES] and len({r["loss"] for r in run.values()}) == 3
    for name in NAMES:
        [sliced] = files.result(form, name).values()
        assert elastic[name] == run[name]
        assert sliced["loss"] == pytest.approx(run[name]["loss"], rel=2e-4)
        assert {k: v for k, v in sliced.items() if k != "loss"} == {
            k: v for k, v in run[name].items() if k != "loss"
        }


@formats
def test_format_and_bytes_are_those_of_the_files(files: Files, form: Format) -> None:
    for name, result in files.result(form, "run").items():
        stored = tensors(files.root / form.name / "slices" / name)
        assert result["weights"] == form.name
        assert result["weights_bytes"] == sum(t.nbytes for t in stored.values())


@formats
def test_inputs_are_rounded(
    files: Files, story: Story, quantised: Path, tmp_path: Path, form: Format
) -> None:
    """The loss of the numbers alone is another one; that is what a run gets that starts from them."""
    done("import", files.root / form.name / "elastic", tmp_path / "numbers")
    ran = done("eval", tmp_path / "numbers", "--text", story.text, "--seq-length", 64, "--json").json[
        "submodels"
    ]
    for name, result in files.result(form, "run").items():
        assert ran[name]["weights"] == "fp32"
        assert abs(ran[name]["loss"] - result["loss"]) > 1e-4


def test_unquantised_weights_have_a_dtype(story: Story) -> None:
    for name in ("large", "medium", "small"):
        [sliced] = story.ran[f"eval {name}"].json["submodels"].values()
        for evaluated in (sliced, story.ran["eval checkpoint"].json["submodels"][name]):
            assert evaluated["weights"] == "fp32"
            assert evaluated["weights_bytes"] == sum(t.nbytes for t in tensors(story.slice(name)).values())


def test_bytes_and_format_are_printed(story: Story, files: Files) -> None:
    path = files.root / "nvfp4/slices/smallest"
    ran = done("eval", path, "--text", story.text, "--seq-length", 64)
    size = files.result(FORMATS["NVFP4"], "smallest")["parent"]["weights_bytes"]
    assert ran.out.rstrip().endswith(f" active, nvfp4 weights of {size / 2**30:.3g} GiB")


def test_a_recipe_exports_it(quantised: Path, tmp_path: Path) -> None:
    """What single commands write; ``dtype`` is that of what is not quantised, and another one is another export."""
    (tmp_path / "export.yaml").write_text(RECIPE.format(checkpoint=quantised / "nvfp4"))
    written = done("export", tmp_path / "export.yaml", "--json").json["written"]
    elastic, *slices = map(Path, written)
    assert [s.name for s in slices] == [*NAMES]
    done("export", quantised / "nvfp4", tmp_path / "same", "--elastic", "--dtype", "bf16")
    done("slice", elastic, tmp_path / "cut", *[part for name in NAMES for part in ("--submodel", name)])
    for ours, theirs in ((elastic, tmp_path / "same"), *((s, tmp_path / "cut" / s.name) for s in slices)):
        assert [*snapshot(ours).values()] == [*snapshot(theirs).values()]
    assert Manifest.read(elastic / "elastic_config.json").quantised is None
    assert json.loads((elastic / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {str(t.dtype) for t in tensors(elastic).values()} == {
        "torch.bfloat16", "torch.float32", "torch.uint8", "torch.float8_e4m3fn",
    }  # fmt: skip
    assert len(done("export", tmp_path / "export.yaml", "--json").json["kept"]) == 4
    [line] = refused("export", tmp_path / "export.yaml", "export.dtype=fp32")
    assert line.startswith(f"{elastic} was exported with dtype bf16 instead of fp32; ")
