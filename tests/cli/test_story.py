"""What the commands promise about a family that was trained, exported, sliced and evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_story import SUBMODELS, Story, config, done, metrics, refused, run, snapshot, tensors

from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.recipe import dump, load

EVALUATED = {"loss", "tokens", "total_params", "active_params", "weights", "weights_bytes"}
STEP = {"step", "tokens", "loss", "kd_loss", "router_loss", "budget", "lr", "grad_norm", "step_ms"}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_checkpoint_family_and_slices_are_the_same_models(story: Story) -> None:
    checkpoint = story.ran["eval checkpoint"].json["submodels"]
    family = story.ran["eval family"].json["submodels"]
    assert list(checkpoint) == list(family) == list(SUBMODELS)
    for name in SUBMODELS:
        [sliced] = story.ran[f"eval {name}"].json["submodels"].values()
        for found in (checkpoint[name], family[name], sliced):
            assert set(found) == EVALUATED
            assert found["loss"] == pytest.approx(checkpoint[name]["loss"], rel=1e-5)
            assert {k: found[k] for k in EVALUATED - {"loss"}} == {
                k: checkpoint[name][k] for k in EVALUATED - {"loss"}
            }
    assert len({checkpoint[n]["loss"] for n in SUBMODELS}) > 1


def test_every_position_but_the_first_of_a_window_is_scored(story: Story) -> None:
    count, windows = len(story.text.read_bytes()), -(-len(story.text.read_bytes()) // 256)
    assert {r["tokens"] for r in story.ran["eval family"].json["submodels"].values()} == {count - windows}


@pytest.mark.parametrize("name", SUBMODELS)
def test_counted_parameters_are_the_tensors_on_disk(story: Story, name: str) -> None:
    stored = sum(t.numel() for t in tensors(story.slice(name)).values())
    assert story.ran["eval family"].json["submodels"][name]["total_params"] == stored
    assert story.ran["plan family"].json["submodels"][name]["total_params"] == stored


def test_plan_has_the_promised_shape(story: Story) -> None:
    for key in ("plan", "plan family"):
        plan = story.ran[key].json
        assert {"parent", "submodels", "family_bytes", "layout"} <= set(plan)
        assert set(plan["layout"]) >= {"ok", "problems"} and plan["layout"]["ok"] is True
        for sizes in (plan["parent"], *plan["submodels"].values()):
            assert {
                "total_params", "active_params", "flops_per_token", "weights_bytes", "cache_bytes_per_sequence",
            } <= set(sizes)  # fmt: skip
            assert {"bf16", "fp8", "nvfp4"} <= set(sizes["weights_bytes"])
    assert list(story.ran["plan family"].json["submodels"]) == list(SUBMODELS)
    assert story.ran["plan"].json["parent"] == story.ran["plan family"].json["parent"]


@pytest.mark.parametrize("command", ["eval", "plan", "report", "recipe", "export", "train"])
def test_json_is_all_that_stdout_gets(
    story: Story, command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Down to the file descriptor: also what libraries and child processes print goes elsewhere."""
    from elastic_megatron.cli import main

    arguments: dict[str, list[Any]] = {
        "eval": [story.root / "elastic_hf", "--text", story.text],
        "plan": [story.recipe("elastic")],
        "report": [story.elastic, "--out", tmp_path / "page.html"],
        "recipe": ["show", story.recipe("elastic")],
        "export": [story.elastic, tmp_path / "hf", "--submodel", "small"],
        "train": [story.recipe("parent"), f"run_dir={tmp_path / 'run'}", "stages.0.tokens=512"],
    }
    capfd.readouterr()
    assert main([command, *map(str, arguments[command]), "--json"]) == 0
    out = capfd.readouterr().out
    assert isinstance(json.loads(out), dict) and out.count("\n") == 1


@pytest.mark.parametrize("name", SUBMODELS)
def test_a_submodel_of_the_checkpoint_is_the_slice_of_the_family(
    story: Story, name: str, tmp_path: Path
) -> None:
    done("export", story.elastic, tmp_path / "exported", "--submodel", name)
    done("slice", story.elastic, tmp_path / "sliced", "--submodel", name)
    for directory in (tmp_path / "exported", tmp_path / "sliced"):
        assert same(tensors(directory), tensors(story.slice(name)))
        assert config(directory) == config(story.slice(name))
        assert list(snapshot(directory).values()) == list(snapshot(story.slice(name)).values())


@pytest.mark.parametrize("name", [None, "small"])
def test_plain_order_is_another_order_of_the_same_function(
    story: Story, name: str | None, tmp_path: Path
) -> None:
    import transformers

    chosen = ["--submodel", name] if name else []
    done("export", story.elastic, tmp_path / "lanes", *chosen)
    done("export", story.elastic, tmp_path / "plain", "--plain-order", *chosen)
    lanes, plain = tensors(tmp_path / "lanes"), tensors(tmp_path / "plain")
    assert lanes.keys() == plain.keys() and not same(lanes, plain)
    ids = torch.randint(5, 264, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = (
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path / d)
            .eval()(ids, use_cache=False)
            .logits
            for d in ("lanes", "plain")
        )
    assert float((a - b).norm() / a.norm()) < 2e-6


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_import_then_export_gives_the_same_bits(story: Story, dtype: str, tmp_path: Path) -> None:
    source = story.root / "elastic_hf"
    if dtype == "bf16":
        source = tmp_path / "bf16"
        done("export", story.elastic, source, "--elastic", "--dtype", "bf16")
        assert tensors(source)["lm_head.weight"].dtype is torch.bfloat16
    done("import", source, tmp_path / "checkpoint")
    done("export", tmp_path / "checkpoint", tmp_path / "again", "--elastic", "--dtype", dtype)
    assert same(tensors(tmp_path / "again"), tensors(source))
    assert config(tmp_path / "again") == config(source)
    elastic = [json.loads((d / "elastic_config.json").read_text()) for d in (source, tmp_path / "again")]
    assert elastic[0] == elastic[1]
    done("slice", tmp_path / "again", tmp_path / "small", "--submodel", "small")
    if dtype == "fp32":
        assert same(tensors(tmp_path / "small"), tensors(story.slice("small")))


def test_nothing_existing_is_overwritten(story: Story, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    for command in (
        ["export", story.elastic, kept],
        ["slice", story.root / "elastic_hf", kept, "--submodel", "small"],
        ["slice", story.elastic, kept, "--submodel", "small"],
    ):
        [line] = refused(*command)
        assert str(kept) in line and "already exists" in line
    shutil.copytree(story.elastic, tmp_path / "run")
    before |= snapshot(tmp_path / "run")
    [line] = refused("import", story.root / "elastic_hf", tmp_path / "run")
    assert "holds a checkpoint already" in line
    assert snapshot(tmp_path) == before


def test_run_folder_is_laid_out_as_designed(story: Story) -> None:
    run_dir, checkpoints = story.elastic, story.elastic / "checkpoints"
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text().strip() == "12"
    assert sorted(p.name for p in checkpoints.glob("iter_*")) == ["iter_0000008", "iter_0000012"]
    for folder in checkpoints.glob("iter_*"):
        assert Manifest.read(folder / "elastic.json").submodels.keys() == set(SUBMODELS)
        assert (folder / "hf" / "tokenizer.json").exists()
    assert {p.name for p in story.root.rglob("*") if p.name[0] == "." or p.suffix == ".incomplete"} == {
        ".metadata"
    }
    assert (run_dir / "report.html").exists()
    ranked = story.root / "runs" / "rank"
    assert (ranked / "ranking.safetensors").exists() and (ranked / "ranking.json").exists()
    assert sorted(p.name for p in (story.root / "elastic_hf").glob("*.json")) == [
        "config.json", "elastic_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_metrics_have_a_full_line_for_every_step(story: Story) -> None:
    lines = metrics(story.elastic)
    steps = [line for line in lines if "step" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert [line["tokens"] for line in steps] == [512 * i for i in range(1, 13)]
    budgets = set(SUBMODELS)
    for line in steps:
        assert set(line) >= STEP
        assert all(isinstance(line[k], float) for k in ("loss", "kd_loss", "router_loss", "lr", "grad_norm"))
        drawn = line["budget"]
        if isinstance(drawn, dict):  # several micro-batches drew several budgets
            assert set(drawn) <= budgets and sum(drawn.values()) == (4 if line["step"] <= 8 else 2)
        else:
            assert drawn in budgets
    evals = [line["eval"] for line in lines if "eval" in line]
    assert [e["step"] for e in evals] == [8, 12]
    assert all(set(e["submodels"]) == budgets for e in evals)
    plain = [line for line in metrics(story.root / "runs" / "parent") if "step" in line]
    assert all(set(line) >= STEP and line["budget"] is None and line["kd_loss"] is None for line in plain)
    assert plain[-1]["loss"] < 0.8 * plain[0]["loss"]


@pytest.mark.parametrize("name", ["parent", "rank", "elastic"])
def test_recipe_of_the_run_folder_is_the_resolved_one(story: Story, name: str) -> None:
    kept = story.root / "runs" / name / "recipe.yaml"
    assert load(kept) == load(story.recipe(name))
    assert kept.read_text() == dump(load(story.recipe(name)))
    if name == "elastic":
        assert yaml.safe_load(story.ran["show"].out) == yaml.safe_load(kept.read_text())


def test_ranking_leaves_the_function_as_it_was(story: Story) -> None:
    ranked = story.ran["rank"].json
    assert set(ranked) == {"checkpoint", "tokens", "logits_error", "unseen"}
    assert ranked["tokens"] == 8 * 64 and 0 <= ranked["logits_error"] < 1e-5
    losses = [
        done("eval", story.root / "runs" / n, "--text", story.text, "--json").json["submodels"]["parent"][
            "loss"
        ]
        for n in ("parent", "rank")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_resuming_a_finished_run_changes_nothing(story: Story) -> None:
    before = snapshot(story.elastic)
    assert done("train", story.recipe("elastic"), "--json").json == story.ran["train"].json
    assert snapshot(story.elastic) == before


def test_one_submodel_is_evaluated_alone(story: Story) -> None:
    alone = done("eval", story.elastic, "--text", story.text, "--submodel", "small", "--json").json
    assert alone["submodels"] == {"small": story.ran["eval checkpoint"].json["submodels"]["small"]}
    spoken = done("eval", story.elastic, "--text", story.text, "--submodel", "small")
    assert spoken.out.split()[:3] == ["small", "loss", f"{alone['submodels']['small']['loss']:.4f}"]


def test_a_reader_that_leaves_early_is_no_error(story: Story) -> None:
    """``elastic-megatron recipe schema | head -1``."""
    import os
    import subprocess
    import sys

    reader, writer = os.pipe()
    os.close(reader)
    try:
        for arguments in (["recipe", "schema"], ["recipe", "show", str(story.recipe("elastic")), "--json"]):
            ended = subprocess.run(
                [sys.executable, "-m", "elastic_megatron.cli", *arguments],
                stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60,
            )  # fmt: skip
            assert (ended.returncode, ended.stderr) == (0, "")
    finally:
        os.close(writer)


def test_overrides_win_over_the_file(story: Story) -> None:
    shown = done("recipe", "show", story.recipe("elastic"), "optimizer.lr=3e-4", "--json").json
    assert shown["optimizer"]["lr"] == 3e-4
    assert run("recipe", "schema").status == 0
