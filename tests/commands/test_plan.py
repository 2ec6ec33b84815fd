"""``plan``: published numbers from recipes and configs, without torch."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from plan_calls import CHAIN_OF_NANO, NANO, V2, parse, planned, shape_of, write_config

from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.cost import account, sizes_of_spec
from elastic_megatron.cost.memory import cache_bytes
from elastic_megatron.errors import UserError
from elastic_megatron.space import Budget, ElasticSpace, SubmodelSpec


def test_nemotron3_nano_has_its_published_size() -> None:
    result = planned(NANO)
    assert result["parent"]["total_params"] == 31_577_940_288
    assert result["parent"]["active_params"] == 3_580_076_352
    assert result["layout"] == {
        "ok": True,
        "problems": [],
        "dense": {"tensor": 2, "context": 4, "pipeline": 1, "data": 32},
        "expert": {"expert_tensor": 1, "expert": 8, "pipeline": 1, "data": 32},
        "layers_per_stage": [[52]],
    }
    assert [b["reachable"] for b in result["budgets"].values()] == [True, True, True]
    assert result["budgets"]["23b"] | {"smallest": 0} == {
        "metric": "active_params", "target": 2.8e9, "unit": "absolute", "absolute": 2.8e9, "smallest": 0,
        "full": 3_580_076_352, "reachable": True,
    }  # fmt: skip


def test_nemotron_nano_v2_has_its_published_size() -> None:
    assert planned(V2)["parent"]["total_params"] == 12_310_001_152


def test_shape_of_the_result(small: Path) -> None:
    result = planned(small)
    costs = {
        "total_params", "active_params", "flops_per_token", "weights_bytes", "cache_bytes_per_sequence",
        "cache_bytes",
    }  # fmt: skip
    assert set(result["parent"]) == costs
    assert set(result["parent"]["weights_bytes"]) == {"bf16", "fp8", "nvfp4"}
    assert set(result["submodels"]) == {"full", "smallest"}
    assert set(result["submodels"]["smallest"]) == costs | {"widths"}
    assert result["submodels"]["smallest"]["widths"] == {"hidden_size": 32, "num_moe_experts": 4}
    full = dict(result["submodels"]["full"])
    assert full.pop("widths") == {"hidden_size": 64, "num_moe_experts": 8} and full == result["parent"]
    both = [result["submodels"][n]["weights_bytes"]["bf16"] for n in ("full", "smallest")]
    assert result["family_bytes"]["bf16"] == both[0]
    assert result["family_bytes"]["separate"]["bf16"] == sum(both)
    memory = result["memory_per_rank"]
    assert memory["total"] == sum(v for k, v in memory.items() if k != "total")


def test_directory_and_config_equal_the_recipe(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "hf", shape_of(NANO))
    recipe = planned(NANO)
    for source in (folder, folder / "config.json"):
        result = planned(source)
        assert result["parent"] == recipe["parent"]
        assert result["submodels"] == result["budgets"] == {}
    assert planned(NANO, "model.sizes=null", f"model.hf={folder}") == recipe


def test_elastic_directory_lists_its_submodels(tmp_path: Path, small: Path) -> None:
    shape = shape_of(small)
    space = ElasticSpace.build(shape, {"hidden_size": [32, 48, 64], "mamba_num_heads": [4, 8]})
    specs = {"big": space.full(), "mid": SubmodelSpec.of({"hidden_size": 48, "mamba_num_heads": 4})}
    folder = write_config(tmp_path / "hf", shape)
    budgets = (Budget("big", "total_params", 1.0), Budget("mid", "total_params", 0.7))
    Manifest(shape, space, budgets, specs).write(folder / "elastic_config.json")
    result = planned(folder, "--context", 100)
    caches = result["submodels"]["mid"].pop("cache_bytes")
    assert set(result["submodels"]) == set(result["budgets"]) == {"big", "mid"}
    exact = json.loads(json.dumps(account(space, specs["mid"], 100).to_dict()))
    assert result["submodels"]["mid"] == {**exact, "widths": {"hidden_size": 48, "mamba_num_heads": 4}}
    lengths = (100, 8192, 49152, 262144)
    model = sizes_of_spec(space, specs["mid"])
    assert caches == {str(n): cache_bytes(model, n) for n in lengths} and result["jobs"] == {}
    separate = sum(s["weights_bytes"]["nvfp4"] for s in result["submodels"].values())
    assert result["family_bytes"]["separate"]["nvfp4"] == separate


def test_checkpoints_are_planned_by_their_manifest(tmp_path: Path, small: Path) -> None:
    shape = shape_of(small)
    root = tmp_path / "run" / "checkpoints"
    (root / "iter_0000007").mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("7\n")
    space = ElasticSpace.build(
        shape, {"hidden_size": [32, 64], "num_moe_experts": [4, 8]}, {"num_moe_experts": 2}
    )
    chosen = {"tiny": space.smallest()}
    Manifest(shape, space, submodels=chosen).write(root / "iter_0000007" / "elastic.json")
    for path in (tmp_path / "run", root, root / "iter_0000007"):
        result = planned(small, "model.sizes=null", f"model.checkpoint={path}")
        assert result["parent"] == planned(small)["parent"]
        assert set(result["submodels"]) == {"tiny"}
    other = planned(small, "model.sizes=null", f"model.checkpoint={root}", "space.choices.hidden_size=[48]")
    assert set(other["submodels"]) == {"full", "smallest"}, "other widths have no trained submodels"
    with pytest.raises(UserError, match="holds no checkpoint"):
        planned(small, "model.sizes=null", f"model.checkpoint={tmp_path}")


def test_context_changes_caches_and_flops_only(small: Path) -> None:
    short, long = planned(small, "--context", 10)["parent"], planned(small, "--context", 20)["parent"]
    changed = {k for k in short if short[k] != long[k]}
    assert changed == {"cache_bytes_per_sequence", "flops_per_token", "cache_bytes"}
    assert short["cache_bytes"]["10"] == short["cache_bytes_per_sequence"]
    assert short["cache_bytes"]["8192"] == long["cache_bytes"]["8192"]


@pytest.mark.parametrize(
    ("budget", "absolute", "reachable"),
    [
        ("{metric: active_params, target: 0.9}", None, True),
        ("{metric: total_params, target: 1, unit: absolute}", 1, False),
        ("{metric: total_params, target: 1e9, unit: absolute}", 1e9, False),
        ("{metric: memory_bytes, target: 1.0, sequence_length: 10}", None, True),
    ],
)
def test_budgets_are_compared_with_the_range(
    small: Path, budget: str, absolute: float | None, reachable: bool
) -> None:
    found = planned(small, f"budgets={{b: {budget}}}")["budgets"]["b"]
    assert found["absolute"] == (absolute or found["target"] * found["full"])
    assert found["reachable"] is reachable


def test_layout_problems_are_findings(small: Path) -> None:
    result = planned(small, "parallel.tensor=3")
    assert result["layout"]["ok"] is False
    assert any("mamba_num_groups=2" in p for p in result["layout"]["problems"])


def test_calibration_sequences_are_checked_where_nothing_is_trained(small: Path) -> None:
    found = planned(small, "parallel.context=2", "rank.seq_length=30")["layout"]["problems"]
    assert len(found) == 1 and found[0].startswith("rank: seq_length=30 is not a multiple of 4")
    assert planned(small, "parallel.context=2", "rank.seq_length=32")["layout"]["ok"]


def test_layers_lie_on_stages_as_the_pipeline_cuts_them(small: Path) -> None:
    nano = planned(NANO, "parallel.pipeline=2", "parallel.virtual_pipeline=3")["layout"]
    assert nano["ok"] and nano["layers_per_stage"] == [[8, 9, 9], [9, 9, 8]]
    dense = planned(small, "parallel.pipeline=2")["layout"]
    assert dense["layers_per_stage"] == [[2], [1]] and dense["dense"]["data"] is None
    deep = planned(small, "parallel.pipeline=4")
    assert deep["layout"]["layers_per_stage"] == [] and deep["memory_per_rank"] is None
    assert deep["layout"]["problems"] == [
        "parallel.pipeline=4 is more than the 3 layers; set parallel.pipeline=3"
    ]


def test_stages_set_the_memory(small: Path) -> None:
    stage = "{name: s, tokens: 1, seq_length: 64, global_batch_size: 2, micro_batch_size: 2}"
    inference, training = (
        planned(small)["memory_per_rank"],
        planned(small, f"stages=[{stage}]")["memory_per_rank"],
    )
    assert inference["gradients"] == inference["teacher"] == 0
    assert training["gradients"] == 2 * training["weights"] and training["teacher"] == training["weights"]


@pytest.mark.parametrize("arguments", [[NANO], [V2], [NANO, "budgets.12b.target=1e9", "parallel.expert=16",
                                                     "parallel.context=8", "parallel.world_size=null"]])  # fmt: skip
def test_people_read_tables(arguments: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    args = parse(*arguments)
    assert args.handler(args) is None
    shown = capsys.readouterr().out
    assert "…" not in shown, "nothing is cut off at 80 columns"
    for text in (
        "smallest",
        "NVFP4",
        "optimizer",
        "layout",
        "range of the family",
        "choices",
        "256K",
        "logits",
    ):
        assert text in shown
    if len(arguments) > 1:
        assert "out of reach" in shown and "add smaller space.choices" in shown
        assert "layout does not fit" in shown and "parallel.expert=16" in shown


def test_people_read_where_ranks_and_layers_lie(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse(NANO, "parallel.pipeline=2", "parallel.virtual_pipeline=3")
    args.handler(args)
    shown = capsys.readouterr().out
    assert "dense parameters: tensor 2 x context 4 x pipeline 2 x data 16\n" in shown
    assert "expert parameters: expert_tensor 1 x expert 8 x pipeline 2 x data 16\n" in shown
    assert "layers per pipeline stage: 8 + 9 + 9, 9 + 9 + 8\n" in shown
    args = parse(small, "parallel.pipeline=64")
    args.handler(args)
    shown = capsys.readouterr().out
    assert "pipeline 64 x data ?" in shown and "memory per rank" not in shown


def test_trained_families_show_their_widths(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = shape_of(small)
    space = ElasticSpace.build(shape, {"mamba_num_heads": [4, 8]}, per_layer=["mamba_num_heads"])
    folder = write_config(tmp_path / "hf", shape)
    Manifest(shape, space, submodels={"mid": SubmodelSpec.of({"mamba_num_heads": [4]})}).write(
        folder / "elastic_config.json"
    )
    args = parse(folder)
    args.handler(args)
    shown = capsys.readouterr().out
    assert "mid" in shown and "Mamba heads (per layer)" in shown and "choices" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "none.yaml"),
        (["."], "config.json is missing"),
        ([".", "seed=1"], "overrides belong to recipes"),
        (["small.yaml", "space.choices.hidden_size=[65]"], "nearest legal"),
        (["small.yaml", "--context", "0"], "--context 0"),
        (
            ["small.yaml", "budgets={b: {metric: latency, target: 0.5, table: no.json}}"],
            "no.json cannot be read",
        ),
    ],
)
def test_bad_input_is_one_line(
    small: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(small.parent)
    with pytest.raises(UserError, match=message) as caught:
        planned(*arguments)
    assert "\n" not in str(caught.value)


def test_broken_configs_are_named(tmp_path: Path) -> None:
    for text, message in (("{", "no valid JSON"), ("[]", "holds a list"), ("{}", "nemotron_h")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=message):
            planned(tmp_path)


def test_people_read_the_exact_size_of_nano(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse(NANO)
    args.handler(args)
    shown = capsys.readouterr().out
    assert "31,577,940,288 parameters, 3,580,076,352 active" in shown


def test_nano_is_priced_at_its_published_scale() -> None:
    """160 B tokens at 4 forward passes and one to recompute, 3.58 B active parameters: 6 x 10^21 operations."""
    job = planned(NANO)["jobs"]["train"]
    assert job["tokens"] == pytest.approx(160e9, rel=1e-3)
    assert job["flops"] == pytest.approx(160e9 * 5 * 2 * 3.58e9, rel=0.25)
    assert job["gpu_hours"] == pytest.approx([job["flops"] / (989e12 * u * 3600) for u in (0.155, 0.08)])


def test_plan_imports_no_torch() -> None:
    script = f"""
        import argparse, sys
        from elastic_megatron.commands import plan
        parser = argparse.ArgumentParser()
        plan.add_parser(parser.add_subparsers())
        for source in {[str(NANO), str(CHAIN_OF_NANO)]!r}:
            try:
                args = parser.parse_args(["plan", source])
                args.handler(args)
            except Exception as error:
                assert "config.json is missing" in str(error), error
        heavy = {{"torch", "megatron", "transformers", "numpy"}} & set(sys.modules)
        assert not heavy, heavy
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
