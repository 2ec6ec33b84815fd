"""What calibration finds, compared with what a plain model's hooks see of every linear."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import one_hot
from quantised_runs import QUANTIZE, SPACE, STAGES, SUBMODELS, UNSEEN, recipe_of, save_family
from torch import Tensor, nn

from elastic_megatron import runtime
from elastic_megatron.blocks import SlicedModel, build_elastic_model
from elastic_megatron.checkpoint.amax import Amax, read_amax
from elastic_megatron.checkpoint.manifest import FILE, Manifest
from elastic_megatron.checkpoint.source import open_source
from elastic_megatron.errors import UserError
from elastic_megatron.ops.locate import locate
from elastic_megatron.recipe import Recipe
from elastic_megatron.training.batches import eval_windows
from elastic_megatron.training.datasets import dataset
from elastic_megatron.training.quantize import Calibrated, quantize

pytestmark = pytest.mark.usefixtures("megatron")
FEEDING = "decoder.layers.2."
Largest = dict[str, float]


@pytest.fixture(scope="module")
def family(megatron: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def recipe(write_recipe: Callable[..., Path], family: Path) -> Callable[..., Recipe]:
    return lambda run_dir, **sections: recipe_of(write_recipe, run_dir, family, **sections)


@dataclass(frozen=True)
class Done:
    recipe: Recipe
    result: Calibrated

    @property
    def folder(self) -> Path:
        return self.recipe.run_dir / "checkpoints" / "iter_0000000"

    @property
    def amax(self) -> dict[str, Amax]:
        return read_amax(self.folder)

    def lines(self, key: str) -> list[dict[str, Any]]:
        text = (self.recipe.run_dir / "metrics.jsonl").read_text()
        return [line[key] for line in map(json.loads, text.splitlines()) if key in line]


@pytest.fixture(scope="module")
def done(recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Done:
    wanted = recipe(tmp_path_factory.mktemp("done") / "run", stages=[])
    return Done(wanted, quantize(wanted))


def seen_by_hooks(
    family: Path, batches: Sequence[Tensor], submodels: Sequence[str] = tuple(SUBMODELS), dtype: str = "fp32"
) -> Largest:
    """The largest magnitude that every linear of a model without quantisers is multiplied with, by its weight's name.

    Linears that no token reaches are left out.
    """
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = build_elastic_model(SPACE, dtype=kind).eval()
    open_source(family).fill([model])
    found: dict[str, list[Tensor]] = {}
    watches: dict[nn.Module, Any] = {}

    def watch(name: str) -> Any:
        return lambda _, args: found.setdefault(name, []).append(args[0].detach().clone())

    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if (
            isinstance(weight, nn.Parameter)
            and weight.dim() == 2
            and not re.search("embed|router|output_layer", name)
        ):
            module.register_forward_pre_hook(watches.setdefault(module, watch(f"{name}.weight")))

    def alike(module: nn.Module, original: nn.Module, _: object) -> None:
        if original in watches:
            module.register_forward_pre_hook(watches[original])

    sliced = SlicedModel(model, alike=alike)
    with torch.no_grad():
        for tokens in batches:
            positions = torch.arange(tokens.shape[1]).expand_as(tokens)
            for spec in map(SUBMODELS.__getitem__, submodels):
                sliced.forward(one_hot(SPACE, spec, torch.float32), tokens, positions, None)
    seen = {name: [v.abs().max().item() for v in values if v.numel()] for name, values in found.items()}
    return {name: max(values) for name, values in seen.items() if values}


def layer_wide(largest: Largest, names: Sequence[str]) -> Largest:
    """All experts of a layer share the largest of theirs."""

    def kind(name: str) -> tuple[Any, ...]:
        layer, layout, _ = locate(SPACE.parent, name)
        return layer, layout.name

    kinds: dict[tuple[Any, ...], float] = {}
    for name in names:
        kinds[kind(name)] = max(kinds.get(kind(name), 0.0), largest.get(name, 0.0))
    return {name: kinds[kind(name)] for name in names}


def training_batches(recipe: Recipe) -> list[Tensor]:
    """The calibration samples in its batches: one of four, and one of two."""
    settings = recipe.quantize
    assert settings is not None and (settings.samples, settings.micro_batch_size) == (6, 4)
    samples = dataset(recipe, recipe.data.train, seq_length=settings.seq_length, num_samples=settings.samples)
    rows = [torch.as_tensor(samples[i]["tokens"]) for i in range(settings.samples)]
    assert all(len(row) == settings.seq_length for row in rows)
    return [torch.stack(rows[:4]), torch.stack(rows[4:])]


def inputs_of(amax: Mapping[str, Amax]) -> Largest:
    return {name: found.input.item() for name, found in amax.items()}


def test_input_magnitudes_are_the_largest_of_all_batches_through_all_submodels(
    done: Done, family: Path
) -> None:
    """Bit for bit; and each of them matters: less data or fewer submodels find less."""
    amax, batches = done.amax, training_batches(done.recipe)
    seen = seen_by_hooks(family, batches)
    found = layer_wide(seen, list(amax))
    assert inputs_of(amax) == found
    assert {name for name in seen if not name.startswith(FEEDING)} <= amax.keys()
    fewer: dict[str, Any] = {name: (batches, [n for n in SUBMODELS if n != name]) for name in SUBMODELS}
    fewer |= {"batch 1": (batches[1:], list(SUBMODELS)), "batch 2": (batches[:1], list(SUBMODELS))}
    for left_out, arguments in fewer.items():
        other = layer_wide(seen_by_hooks(family, *arguments), list(amax))
        assert other != found and all(other[name] <= found[name] for name in found), left_out
    assert any(seen.get(name) != found[name] for name in found), "experts share"


def test_weight_magnitudes_are_the_weights_own(done: Done, family: Path) -> None:
    model = build_elastic_model(SPACE)
    open_source(family).fill([model])
    own = dict(model.named_parameters())
    assert len(done.amax) == 2 * 1 + 2 * (2 * 6 + 2) + 2 + 2
    for name, found in done.amax.items():
        assert torch.equal(found.weight, own[name].detach().abs().max())
    assert len({found.weight.item() for found in done.amax.values()}) == len(done.amax), (
        "an expert has its own"
    )


def test_bf16_magnitudes_are_the_models_in_fp32(
    recipe: Callable[..., Recipe], family: Path, tmp_path: Path
) -> None:
    wanted = recipe(tmp_path / "run", model={"dtype": "bf16", "checkpoint": str(family)}, stages=[])
    found = Done(wanted, quantize(wanted))
    seen = seen_by_hooks(family, training_batches(wanted), dtype="bf16")
    assert inputs_of(found.amax) == layer_wide(seen, list(found.amax))
    assert {t.dtype for pair in found.amax.values() for t in pair} == {torch.float32}


def test_experts_without_a_token_are_reported_and_have_the_range_of_their_layer(
    done: Done, family: Path
) -> None:
    """Those that no router can choose, and those that none of these tokens chose; their weights' are their own."""
    seen = seen_by_hooks(family, training_batches(done.recipe))
    wanted: dict[str, list[int]] = {}
    for name in done.amax:
        layer, layout, expert = locate(SPACE.parent, name)
        if expert is not None and "linear_fc1" in layout.name and name not in seen:
            wanted.setdefault(f"decoder.layers.{layer}", []).append(expert)
    assert {layer: list(experts) for layer, experts in done.result.unseen.items()} == wanted
    assert all(set(experts) <= set(wanted[layer]) for layer, experts in UNSEEN.items())
    assert done.lines("calibration") == [{"step": 0, "tokens": 6 * 16, "unseen": wanted}]
    for layer, experts in UNSEEN.items():
        for linear in ("linear_fc1", "linear_fc2"):
            names = [f"{layer}.mlp.experts.local_experts.{e}.{linear}.weight" for e in range(6)]
            assert len({done.amax[name].input.item() for name in names}) == 1
            assert done.amax[names[experts[0]]].input == max(seen[n] for n in names if n in seen) > 0


def test_submodels_that_must_be_masked_are_calibrated_alike(
    done: Done, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Also in layers that some of them drop: masked execution computes those too, for nothing."""
    stages = [stage | {"execution": "masked"} for stage in STAGES]
    wanted = recipe(tmp_path / "run", stages=stages)
    found = Done(wanted, quantize(wanted))
    assert inputs_of(found.amax) == pytest.approx(inputs_of(done.amax), rel=1e-6)
    assert found.result.unseen == done.result.unseen


def test_held_out_text_does_not_enter(
    done: Done, recipe: Callable[..., Recipe], family: Path, tmp_path: Path
) -> None:
    """Without any the magnitudes are the same; with its windows among the samples they would not be."""
    sections = json.loads(done.recipe.model_dump_json())["data"]
    blind = recipe(tmp_path / "run", stages=[], data={"train": sections["train"]})
    quantize(blind)
    assert read_amax(blind.run_dir / "checkpoints/iter_0000000") == done.amax
    assert Done(blind, done.result).lines("eval") == [] != Done(blind, done.result).lines("calibration")
    windows = torch.stack(eval_windows(done.recipe))
    more = seen_by_hooks(family, [*training_batches(done.recipe), windows])
    assert layer_wide(more, list(done.amax)) != inputs_of(done.amax)


def test_losses_are_those_of_every_submodel_before_and_after(done: Done) -> None:
    """The teacher is the whole model before; so its own divergence is exactly zero then, and not after."""
    before, after = done.lines("eval")
    assert (before["weights"], after["weights"]) == ("fp32", "nvfp4")
    for line in (before, after):
        assert (line["step"], line["tokens"], list(line["submodels"])) == (0, 0, list(SUBMODELS))
        assert {r["tokens"] for r in line["submodels"].values()} == {4 * 15}
    assert before["submodels"]["full"]["kl"] == 0.0 < after["submodels"]["full"]["kl"]
    for name in SUBMODELS:
        assert before["submodels"][name]["loss"] != after["submodels"][name]["loss"]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_quantising_again_changes_nothing(done: Done) -> None:
    """A job that is started again has nothing to do."""
    before = digests(done.recipe.run_dir)
    again = quantize(done.recipe)
    assert again.checkpoint == done.result.checkpoint and digests(done.recipe.run_dir) == before


@pytest.mark.parametrize(
    "change", [{"format": "fp8"}, {"preset": "mamba_moe_aggressive"}, {"keep_feeding_mamba": False},
               {"keep": ["backbone.layers.5.*"]}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_run_folder_has_one_quantised_model(done: Done, change: dict[str, Any]) -> None:
    assert done.recipe.quantize is not None
    other = done.recipe.model_copy(update={"quantize": type(done.recipe.quantize)(**QUANTIZE | change)})
    before = digests(done.recipe.run_dir)
    refused(other, f"quantize.{next(iter(change))}=")
    assert digests(done.recipe.run_dir) == before


def refused(recipe: Recipe, says: str) -> None:
    with pytest.raises(UserError) as caught:
        quantize(recipe)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_quantised_model_is_no_parent(done: Done, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    model = {"dtype": "fp32", "checkpoint": str(done.recipe.run_dir)}
    refused(recipe(tmp_path / "run", model=model, stages=[]), "is quantised already")
    assert not (tmp_path / "run").exists()


def test_budgets_without_a_submodel_are_refused(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    budgets = {
        "full": {"metric": "active_params", "target": 1.0},
        "tiny": {"metric": "active_params", "target": 0.4},
    }
    refused(recipe(tmp_path / "run", budgets=budgets, stages=[]), "budgets.tiny")
    assert not (tmp_path / "run").exists()


def test_without_budgets_every_submodel_of_the_checkpoint_counts(
    done: Done, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    wanted = recipe(tmp_path / "run", budgets={}, space={}, stages=[])
    quantize(wanted)
    found = Done(wanted, done.result)
    assert found.amax == done.amax
    assert list(found.lines("eval")[1]["submodels"]) == list(SUBMODELS)
    assert Manifest.read(found.folder / FILE).budgets == Manifest.read(done.folder / FILE).budgets


def test_a_plain_model_is_calibrated_as_it_is(
    recipe: Callable[..., Recipe], family: Path, tmp_path: Path
) -> None:
    """A checkpoint without a family, and FP8."""
    from elastic_megatron.checkpoint import distributed

    runtime.start(seed=2)
    model = build_elastic_model(SPACE)
    manifest = open_source(family).manifest
    open_source(family).fill([model])
    distributed.save(tmp_path / "plain", 0, [model], replace(manifest, space=None, budgets=(), submodels={}))
    sections = {"budgets": {}, "space": {}, "stages": [], "quantize": {"format": "fp8"}}
    wanted = recipe(
        tmp_path / "run", model={"dtype": "fp32", "checkpoint": str(tmp_path / "plain")}, **sections
    )
    found = Done(wanted, quantize(wanted))
    seen = seen_by_hooks(family, training_batches(wanted), ["full"])
    assert inputs_of(found.amax) == layer_wide(seen, list(found.amax))
    assert [list(line["submodels"]) for line in found.lines("eval")] == [["parent"], ["parent"]]
