"""Widths that tear a block of NVFP4 are refused by every command that reads the recipe, before anything is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_megatron.checkpoint.resolve import elastic_space, parent_manifest
from elastic_megatron.cli import main
from elastic_megatron.errors import UserError
from elastic_megatron.recipe import load
from elastic_megatron.space import SubmodelSpec
from elastic_megatron.training import start

RECIPE = """\
name: small
run_dir: run
model:
  sizes: {hybrid_layer_pattern: ME*-, hidden_size: 64, vocab_size: 128, mamba_num_heads: 8, mamba_head_dim: 16,
    mamba_state_dim: 16, mamba_num_groups: 2, num_attention_heads: 4, num_query_groups: 2, kv_channels: 16,
    num_moe_experts: 8, moe_router_topk: 2, moe_ffn_hidden_size: 32, moe_shared_expert_intermediate_size: 32,
    ffn_hidden_size: 64}
space: {choices: {hidden_size: [40, 64], ffn_hidden_size: [32, 64]}}
budgets: {full: {metric: total_params, target: 1.0}}
quantize: {format: nvfp4, samples: 8, seq_length: 16}
router: {frozen: false}
stages: [{name: one, tokens: 256, seq_length: 16, global_batch_size: 2, micro_batch_size: 2}]
"""
SAYS = (
    "NVFP4 takes input columns in blocks of 16: hidden_size=40 leaves 40 of them, multiples of 16 would do; "
    "set space.choices.hidden_size=[48,64], or set quantize.format=fp8"
)
MENDED = ("space.choices.hidden_size=[48,64]", "quantize.format=fp8", "quantize.keep=['backbone.layers.*']")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path / "small.yaml"


@pytest.mark.parametrize("command", ["recipe show", "submit --dry-run"])
def test_commands_refuse_them_with_the_nearest_legal_widths(
    recipe: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), str(recipe)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "NVFP4" in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and SAYS in errors[0]


def test_a_recipe_is_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "show", str(recipe)]) == 2
    assert f"error: {recipe}: {SAYS}" in capsys.readouterr().err
    for change in MENDED:
        assert main(["recipe", "show", str(recipe), change]) == 0, change


def test_a_plan_finds_them(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe)]) == 0
    assert SAYS in " ".join(capsys.readouterr().out.split())


def started(path: Path, *overrides: str, frozen: int | None = None) -> object:
    """What a training job does first; ``frozen``: the hidden width of the only submodel, where it stays."""
    recipe = load(path, overrides)
    manifest = parent_manifest(recipe)
    space = elastic_space(recipe, manifest)
    assert space is not None
    specs = [SubmodelSpec.of({"hidden_size": frozen, "ffn_hidden_size": 64})] if frozen is not None else None
    return start.start(recipe, manifest.shape, space, specs)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.runtime, "start", lambda **sizes: sizes)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.usefixtures("runtime")
def test_a_job_that_starts_refuses_them(recipe: Path) -> None:
    with pytest.raises(UserError) as caught:
        started(recipe)
    assert SAYS in str(caught.value)
    for change in MENDED:
        assert started(recipe, change), change
    assert started(recipe, "quantize=null")


@pytest.mark.usefixtures("runtime")
def test_of_frozen_submodels_only_their_own_widths_count(recipe: Path) -> None:
    assert started(recipe, frozen=64)
    with pytest.raises(
        UserError, match=r"hidden_size=40 leaves 40 .*; set quantize.format=fp8, or train with such"
    ):
        started(recipe, frozen=40)


@pytest.mark.usefixtures("runtime")
def test_calibration_is_laid_out_with_the_job(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    batches = ("stages.0.global_batch_size=4", MENDED[0])
    assert started(recipe, *batches)
    with pytest.raises(UserError, match="quantize: samples=7 is not a multiple of micro_batch_size 1 x 2"):
        started(recipe, *batches, "quantize.samples=7")
