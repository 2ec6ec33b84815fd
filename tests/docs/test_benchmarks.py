"""The benchmark of conversions measures the shapes of Nemotron 3 Nano, and its page says what was measured."""

from __future__ import annotations

import json
import runpy
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.checkpoint.resolve import elastic_space, parent_manifest
from elastic_megatron.checkpoint.stored import model_tensors
from elastic_megatron.errors import UserError
from elastic_megatron.recipe import load
from elastic_megatron.space import ParentShape

ROOT = Path(__file__).parents[2]
TOOL = runpy.run_path(str(ROOT / "tools" / "benchmarks" / "convert.py"))
SYNTHETIC, TABLES, MACHINE, OPERATIONS = (
    TOOL["synthetic"],
    TOOL["tables"],
    TOOL["machine"],
    TOOL["OPERATIONS"],
)
README = ROOT / "tools" / "benchmarks" / "README.md"
BEGIN, END = "<!-- conversion-table:begin -->", "<!-- conversion-table:end -->"

PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
# of the released model: hidden 2688; in_proj 2 x 4096 + 2 x 8 x 128 + 64; 32 queries and 2 keys of 128
NANO: dict[str, dict[str, tuple[int, ...]]] = {
    "M": {
        "mixer.in_proj.weight": (10304, 2688),
        "mixer.conv1d.weight": (6144, 1, 4),
        "mixer.conv1d.bias": (6144,),
        "mixer.A_log": (64,),
        "mixer.D": (64,),
        "mixer.dt_bias": (64,),
        "mixer.norm.weight": (4096,),
        "mixer.out_proj.weight": (2688, 4096),
    },
    "*": {
        "mixer.q_proj.weight": (4096, 2688),
        "mixer.k_proj.weight": (256, 2688),
        "mixer.v_proj.weight": (256, 2688),
        "mixer.o_proj.weight": (2688, 4096),
    },
    "E": {
        "mixer.gate.weight": (128, 2688),
        "mixer.gate.e_score_correction_bias": (128,),
        "mixer.shared_experts.up_proj.weight": (3712, 2688),
        "mixer.shared_experts.down_proj.weight": (2688, 3712),
        **{f"mixer.experts.{e}.up_proj.weight": (1856, 2688) for e in range(128)},
        **{f"mixer.experts.{e}.down_proj.weight": (2688, 1856) for e in range(128)},
    },
}
FP32 = ("A_log", "D", "gate.weight", "e_score_correction_bias")


def results(**changes: Any) -> dict[str, Any]:
    """Those of a run that meets every target, as ``convert.py`` puts them together."""
    run = {"seconds": 2.0, "read": 4_000, "written": 2_000, "peak_rss": 100_000_000, "idle_rss": 1,
           "user_seconds": 1.0, "system_seconds": 0.5, "page_faults": 7}  # fmt: skip
    rows = {name: TOOL["_summary"]([run, run | {"seconds": 3.0}], 3_000.0) for name in OPERATIONS}
    model = SYNTHETIC.describe(SYNTHETIC.tiny())
    return {
        "machine": MACHINE.facts(ROOT),
        "versions": MACHINE.versions(),
        "page_cache": "warm",
        "repeats": 2,
        "model": model,
        "copy": {"rate": TOOL["_spread"]([3e9, 2e9]), "cpu_seconds_per_gb": TOOL["_spread"]([0.2])},
        "operations": rows,
        "sweep": [{"model": model, "operations": rows}] * 4,
    } | changes


def changed(name: str, **changes: Any) -> dict[str, Any]:
    """The rows of the operations, one of them changed."""
    rows = results()["operations"]
    return rows | {name: rows[name] | changes}


def keys_of(data: Any) -> Any:
    """The keys of nested objects, without the values."""
    return {key: keys_of(value) for key, value in data.items()} if isinstance(data, dict) else None


def test_the_page_says_what_was_measured() -> None:
    page = README.read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    measured = json.loads(TOOL["RESULTS"].read_text(encoding="utf-8"))
    assert page.split(f"{BEGIN}\n")[1].split(f"\n{END}")[0] == "\n".join(TABLES.render(measured))


def test_the_committed_results_are_whole_and_meet_the_targets() -> None:
    """Every key that a run writes, every operation, and the whole sweep."""
    measured = json.loads(TOOL["RESULTS"].read_text(encoding="utf-8"))
    assert keys_of(measured) == keys_of(results())
    sizes = [run["model"]["bytes"] / 1e9 for run in measured["sweep"]]
    assert [round(size) for size in sizes] == list(TOOL["SWEEP"])
    quick = {name for name, operation in OPERATIONS.items() if operation.quick}
    assert all(run["operations"].keys() == quick for run in measured["sweep"])
    assert TOOL["misses"](measured) == []


def test_the_whole_model_has_the_names_and_shapes_of_nano(tmp_path: Path) -> None:
    """Written as sparse files, which take no space."""
    SYNTHETIC.write(tmp_path / "m", SYNTHETIC.nano(), empty=True)
    opened = read_hf(tmp_path / "m")
    wanted = {"backbone.embeddings.weight": (131072, 2688), "lm_head.weight": (131072, 2688)}
    wanted["backbone.norm_f.weight"] = (2688,)
    for layer, symbol in enumerate(PATTERN):
        tensors = NANO[symbol] | {"norm.weight": (2688,)}
        wanted |= {f"backbone.layers.{layer}.{name}": shape for name, shape in tensors.items()}
    assert {name: entry.shape for name, entry in opened.files.entries.items()} == wanted
    assert sum(map(prod, wanted.values())) == 31_577_940_288
    fp32 = {name for name, entry in opened.files.entries.items() if entry.dtype == torch.float32}
    assert fp32 == {name for name in wanted if name.endswith(FP32)}
    files = list((tmp_path / "m").glob("*.safetensors"))
    assert len(files) == 13 and all(f.stat().st_size < 5.001e9 for f in files)
    assert sum(f.stat().st_blocks for f in files) * 512 < 10_000_000


def test_the_weights_are_finite_and_every_tensor_has_its_own(tmp_path: Path) -> None:
    """Read by the safetensors library, from several files."""
    SYNTHETIC.write(tmp_path / "m", SYNTHETIC.tiny(), max_shard_bytes=300_000)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    assert all(tensor.isfinite().all() and tensor.abs().max() < 2 for tensor in found.values())
    beginnings = {tensor.flatten()[:4].float().numpy().tobytes() for tensor in found.values()}
    assert len(beginnings) == len(found)
    opened = read_hf(tmp_path / "m")
    assert opened.manifest == SYNTHETIC.family(SYNTHETIC.tiny())
    assert {t.name for t in opened.tensors.values()} == {t.name for t in model_tensors(SYNTHETIC.tiny())}


@pytest.mark.parametrize(
    ("gigabytes", "layers", "experts"),
    [(0.9, "ME*", 32), (1, "ME*", 32), (2, "ME*", 32), (3, "ME*", 72), (4, "ME*", 128), (7, "MEMEM*", 128),
     (8, "MEMEM*E", 104), (12, "MEMEM*EME", 128), (63.2, PATTERN, 128), (500, PATTERN, 128)],
)  # fmt: skip
def test_a_part_has_the_first_layers_then_fewer_experts_then_a_smaller_vocabulary(
    gigabytes: float, layers: str, experts: int
) -> None:
    shape = SYNTHETIC.taken(gigabytes)
    assert (shape.hybrid_layer_pattern, shape.num_moe_experts) == (layers, experts)
    kept = {"hybrid_layer_pattern": layers, "num_moe_experts": experts, "vocab_size": shape.vocab_size}
    assert shape == SYNTHETIC.nano().override(**kept)
    assert shape.vocab_size == 131072 or experts == 32
    size = sum(prod(t.shape) * (4 if t.layout.fp32 else 2) for t in model_tensors(shape))
    assert size == SYNTHETIC.nbytes(shape) == SYNTHETIC.describe(shape)["bytes"]
    assert abs(size - min(gigabytes * 1e9, 63_171_719_296)) <= 0.05 * size


def test_a_part_smaller_than_a_layer_of_each_type_is_refused() -> None:
    with pytest.raises(UserError, match=r"--gigabytes 0.5 is too small .* give 0.8\d or more"):
        SYNTHETIC.taken(0.5)


def test_the_submodels_are_choices_of_the_recipe_near_23_and_12_billion() -> None:
    recipe = load(SYNTHETIC.RECIPE)
    space = elastic_space(recipe, parent_manifest(recipe))
    manifest = SYNTHETIC.family(SYNTHETIC.nano())
    assert space is not None and manifest.space == space
    sizes = {}
    for name, spec in manifest.submodels.items():
        space.check(spec)
        sizes[name] = sum(prod(t.shape) for t in model_tensors(space.shape_of(spec))) / 1e9
    assert sizes == pytest.approx({"30b": 31.6, "23b": 22.6, "12b": 12.4}, abs=0.05)
    assert manifest.submodels["12b"] <= manifest.submodels["23b"]


@pytest.mark.parametrize(
    "shape", [SYNTHETIC.tiny(), SYNTHETIC.taken(1), SYNTHETIC.taken(8)], ids=["tiny", "1", "8"]
)
def test_the_submodels_of_a_part_keep_their_proportions(shape: ParentShape) -> None:
    manifest, whole = SYNTHETIC.family(shape), SYNTHETIC.family(SYNTHETIC.nano())
    for name, spec in manifest.submodels.items():
        for axis in spec:
            lanes = manifest.space.lanes_of(axis)
            wanted = whole.submodels[name].at(axis, 0) / SYNTHETIC.nano().size(axis) * shape.size(axis)
            assert abs(spec.at(axis, 0) - wanted) <= lanes / 2


def test_an_operation_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Bytes are those of the files, each counted once; the rehearsal leaves nothing behind."""
    SYNTHETIC.write(tmp_path / "hf", SYNTHETIC.tiny())
    run = TOOL["_run"]("slice_two", tmp_path / "hf", tmp_path / "out", tmp_path, None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["12b", "23b"]
    assert run["written"] == TOOL["size_of"](tmp_path / "out") > 500_000
    assert 0 < run["read"] <= TOOL["size_of"](tmp_path / "hf")
    assert 0 < run["seconds"] < 60 and run["user_seconds"] > 0
    assert 0 <= run["peak_rss"] < 500_000_000 < run["idle_rss"] + 400_000_000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "log", "out"]


def test_a_measurement_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    with pytest.raises(
        UserError, match=r"^slice failed with status 1: .*hf.* is neither a Megatron checkpoint"
    ):
        TOOL["_run"]("slice", tmp_path / "hf", tmp_path / "out", tmp_path, None)


def test_the_scratch_folder_goes_away_when_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TOOL["_scratch"](tmp_path) as folder:
        (folder / "model").mkdir()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_rate_is_bytes_read_and_written_in_rates_of_cp() -> None:
    row = results()["operations"]["slice"]
    assert row["rate"] == {"median": 2_500.0, "min": 2_000.0, "max": 3_000.0}
    assert row["ratio"] == pytest.approx({"median": 5 / 6, "min": 2 / 3, "max": 1.0})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, []),
        ({"operations": changed("slice", ratio={"median": 0.69})}, ["slice runs at 0.69 of cp, the target is 0.7"]),
        ({"operations": changed("slice", ratio={"median": 0.71})}, []),
        ({"operations": changed("export", ratio={"median": 0.49})}, ["export runs at 0.49 of cp, the target is 0.5"]),
        ({"operations": changed("import_verify", ratio={"median": 0.1})}, []),
        ({"operations": changed("import", peak_rss=1_010_000_000)}, ["import takes 1.01 GB, the target is 1.0"]),
        ({"operations": changed("import_verify", peak_rss=1_010_000_000)}, ["import_verify takes 1.01 GB, the target is 1.0"]),
        ({"sweep": [{"operations": changed("import", peak_rss=p)} for p in (100_000_000, 301_000_000)]},
         ["import takes 0.20 GB more for the largest input than for the smallest"]),
        ({"sweep": [{"operations": changed("import", peak_rss=p)} for p in (1_050_000_000, 1_000_000_000)]},
         ["import takes 1.05 GB in the sweep, the target is 1.0"]),
    ],
)  # fmt: skip
def test_a_missed_target_is_named(changes: dict[str, Any], says: list[str]) -> None:
    assert TOOL["misses"](results(**changes)) == says


@pytest.mark.parametrize(("options", "status"), [([], 1), (["--no-check"], 0)])
def test_a_missed_target_is_exit_status_1_unless_only_reported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    status: int,
) -> None:
    missed = results(
        operations=changed("slice", ratio=results()["operations"]["slice"]["ratio"] | {"median": 0.5})
    )
    monkeypatch.setitem(TOOL["main"].__globals__, "_measure_all", lambda args, folder: missed)
    arguments = ["convert.py", "--dir", str(tmp_path), "--json", str(tmp_path / "found.json"), *options]
    monkeypatch.setattr("sys.argv", arguments)
    assert TOOL["main"]() == status
    shown = capsys.readouterr()
    assert shown.err == "missed: slice runs at 0.50 of cp, the target is 0.7\n"
    assert "\n".join(TABLES.render(missed)) + "\n" == shown.out
    assert json.loads((tmp_path / "found.json").read_text()) == missed


def test_the_tool_writes_the_tables_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    TABLES.write(results(), page)
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n{MACHINE.facts(ROOT)['cpu']}, ")
    assert text.endswith(f" |\n{END}\nafter\n")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    first = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    titles = [operation.title for operation in OPERATIONS.values()]
    assert first == ["operation", ":---", *titles, "peak memory for", "---:", *["0.0 GB"] * 4]
    # a cell for each heading, and a column for each operation that results() puts into the sweep
    assert [line.count(" | ") for line in lines] == [8] * (2 + len(titles)) + [len(titles)] * 6


@pytest.mark.parametrize("data", [{}, [1], {"machine": 3}, results(model=None)])
def test_what_is_no_result_is_refused_in_one_line(data: Any) -> None:
    with pytest.raises(
        UserError, match=r"^these are no results of the benchmark .* run tools/benchmarks/convert.py$"
    ):
        TABLES.render(data)


def test_a_disk_that_is_too_small_is_named() -> None:
    assert MACHINE.check_space(ROOT, 1) is None
    assert "give another --dir" in (MACHINE.check_space(ROOT, 10**18) or "")


def test_verification_is_information_only_and_slices_have_the_higher_target() -> None:
    targets = {name: operation.target for name, operation in OPERATIONS.items()}
    assert {name for name, target in targets.items() if target is None} == {"import_verify", "export_verify"}
    assert {name for name, target in targets.items() if target == 0.7} == {"slice", "slice_two"}
