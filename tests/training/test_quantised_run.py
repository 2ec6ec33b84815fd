"""From a family to a quantised one that was distilled: ``quantize``, then ``train`` on quantised leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import stored
from laws import one_hot
from quantised_checkpoints import megatron_names
from quantised_dirs import bits, origin
from quantised_runs import BUDGETS, SHAPE, SPACE, STAGES, SUBMODELS, recipe_of, save_family
from run_state import crash_before, lines
from torch import Tensor, nn

from elastic_megatron.blocks import running
from elastic_megatron.checkpoint import distributed, tracker
from elastic_megatron.checkpoint.amax import Amax, read_amax
from elastic_megatron.checkpoint.manifest import FILE, Manifest
from elastic_megatron.checkpoint.source import open_stored
from elastic_megatron.checkpoint.torch_dist import open_torch_dist
from elastic_megatron.conversion import Request, to_hf
from elastic_megatron.errors import UserError
from elastic_megatron.quantization.formats import Format
from elastic_megatron.quantization.packing import dequantise, fake_quantise
from elastic_megatron.recipe import Recipe
from elastic_megatron.space import SubmodelSpec
from elastic_megatron.training import quantize as quantizing
from elastic_megatron.training import train as training
from elastic_megatron.training.build import build_student, build_teacher
from elastic_megatron.training.family import parent_source
from elastic_megatron.training.quantize import quantize, rounding_of
from elastic_megatron.training.step import ForwardStep
from elastic_megatron.training.train import train

pytestmark = pytest.mark.usefixtures("megatron")
STEPS = 6
FORMATS = ("fp8", "nvfp4")
Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def family(megatron: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def make(write_recipe: Callable[..., Path], family: Path) -> Make:
    return lambda run_dir, **sections: recipe_of(write_recipe, run_dir, family, **sections)


@pytest.fixture(scope="module")
def teachers() -> list[Any]:
    """Those that ``runs`` had."""
    return []


@pytest.fixture(scope="module")
def runs(make: Make, teachers: list[Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """By format, a run of ``train`` alone."""
    found = {}

    def keep(recipe: Recipe, source: Any) -> Any:
        teachers.append(build_teacher(recipe, source)[0])
        return teachers[-1:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizing, "build_teacher", keep)
        patch.setattr(training, "build_teacher", keep)
        for form in FORMATS:
            found[form] = make(tmp_path_factory.mktemp(form) / "run", quantize={"format": form})
            outcome = train(found[form])
            assert (outcome.step, outcome.total_steps, outcome.interrupted) == (STEPS, STEPS, None)
    return found


def folder(recipe: Recipe, step: int = STEPS) -> Path:
    return recipe.run_dir / "checkpoints" / f"iter_{step:07d}"


def weights_in(path: Path) -> dict[str, Tensor]:
    """What training updates, whole tensors by Megatron's names."""
    return dict(open_torch_dist(path, replace(Manifest.read(path / FILE), quantised=None), None).state())


def student(recipe: Recipe, step: int) -> Any:
    """The student as ``train`` has it after so many steps."""
    path, source = folder(recipe, step), parent_source(recipe)
    model = build_student(recipe, source, source.manifest.space, (), rounding_of(recipe, path))
    if step:
        distributed.load(path, model.chunks, optimizer=model.optimizer)
    return model


def assert_same_runs(a: Recipe, b: Recipe) -> None:
    """The same lines, weights, magnitudes and optimizer, bit for bit."""
    assert lines(a.run_dir) == lines(b.run_dir)
    assert bits(weights_in(folder(a))) == bits(weights_in(folder(b)))
    assert (folder(a) / "amax.safetensors").read_bytes() == (folder(b) / "amax.safetensors").read_bytes()
    mine, theirs = (moments(student(recipe, STEPS).optimizer) for recipe in (a, b))
    assert bits(mine) == bits(theirs) and any(t.any() for t in mine.values())


def moments(optimizer: Any) -> dict[str, Tensor]:
    inner = [o.optimizer for o in getattr(optimizer, "chained_optimizers", [optimizer])]
    states = [state for o in inner for state in o.state.values()]
    return {f"{i}.{k}": v for i, s in enumerate(states) for k, v in s.items() if isinstance(v, Tensor)}


# --- one result, however it is reached ---


def test_training_alone_quantises_first(runs: dict[str, Recipe], make: Make, tmp_path: Path) -> None:
    """``quantize`` and then ``train`` leave what ``train`` leaves."""
    recipe = make(tmp_path / "run")
    done = quantize(recipe)
    assert tracker.newest(done.checkpoint) == folder(recipe, 0)
    assert sum("step" in line for line in lines(recipe.run_dir)) == 0
    torch.manual_seed(999)
    assert train(recipe).step == STEPS
    assert_same_runs(recipe, runs["nvfp4"])


@pytest.mark.parametrize(("form", "crash_at", "last"), [("nvfp4", 3, 2), ("fp8", 4, 4)])
def test_resuming_is_exact(
    runs: dict[str, Recipe], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, crash_at: int,
    last: int,
) -> None:  # fmt: skip
    """Killed between two checkpoints, and right after one."""
    recipe = make(tmp_path / "run", quantize={"format": form})
    crash_before(recipe, crash_at, monkeypatch)
    assert tracker.newest(recipe.run_dir / "checkpoints") == folder(recipe, last)
    torch.manual_seed(999)
    assert train(recipe).step == STEPS
    assert_same_runs(recipe, runs[form])


def test_sliced_runs_round_as_masked_ones(runs: dict[str, Recipe], make: Make, tmp_path: Path) -> None:
    """From its calibration on; in fp32, where a sum's last bit may move a value to the next step of the format."""
    losses: dict[str, list[float]] = {}
    for execution in ("masked", "sliced"):
        stages = [stage | {"execution": execution} for stage in STAGES]
        recipe = make(tmp_path / execution, quantize={"format": "fp8"}, stages=stages)
        train(recipe)
        losses[execution] = [line["loss"] for line in lines(recipe.run_dir) if "step" in line]
    assert losses["sliced"] == [line["loss"] for line in lines(runs["fp8"].run_dir) if "step" in line], "auto"
    assert losses["masked"] == pytest.approx(losses["sliced"], rel=1e-4)


def test_a_finished_run_is_left_alone(runs: dict[str, Recipe]) -> None:
    before = lines(runs["fp8"].run_dir)
    assert train(runs["fp8"]).step == STEPS and lines(runs["fp8"].run_dir) == before


@pytest.mark.parametrize(
    "change", [{"format": "fp8"}, {"preset": "mamba_moe_conservative"}, {"keep": ["lm_head", "*.4.*"]}]
)
def test_a_run_keeps_its_quantisation(
    runs: dict[str, Recipe], make: Make, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Also at its first step, where the checkpoint is the one that ``quantize`` left; and by what the checkpoint
    itself knows, where nobody has kept the recipe."""
    shutil.copytree(runs["nvfp4"].run_dir, tmp_path / "run")
    other = make(tmp_path / "run", quantize=change)
    for words in (f"^quantize.{next(iter(change))}=", "another section quantize"):
        for step in (STEPS, 0):
            tracker.point(tmp_path / "run/checkpoints", step)
            with pytest.raises(UserError, match=words) as caught:
                train(other)
            assert "\n" not in str(caught.value)
        (tmp_path / "run/recipe.yaml").unlink(missing_ok=True)
    assert lines(tmp_path / "run") == lines(runs["nvfp4"].run_dir)


# --- what does not move, and what does ---


@pytest.mark.parametrize("form", FORMATS)
def test_the_first_checkpoint_has_the_parents_weights(
    runs: dict[str, Recipe], family: Path, form: str
) -> None:
    parent, first, last = (weights_in(p) for p in (family, folder(runs[form], 0), folder(runs[form])))
    assert bits(first) == bits(parent)
    unmoved = [n for n in last if torch.equal(last[n], first[n]) and "expert" not in n]
    assert unmoved == [], "but for experts that no token chose"


@pytest.mark.parametrize("form", FORMATS)
def test_magnitudes_stay_those_of_calibration(runs: dict[str, Recipe], form: str) -> None:
    """Every weight has its own, and no step changes one: also where a weight grows beyond it."""
    first, steps = read_amax(folder(runs[form], 0)), (2, 4, STEPS)
    assert all(read_amax(folder(runs[form], step)) == first for step in steps)
    manifests = [Manifest.read(folder(runs[form], step) / FILE) for step in (0, *steps)]
    assert len({m.quantised for m in manifests}) == 1 and manifests[0].quantised is not None
    assert manifests[0].quantised.format.name == form
    last = weights_in(folder(runs[form]))
    assert any(last[name].abs().max() > found.weight for name, found in first.items())


def test_the_teacher_is_the_unquantised_model_bit_for_bit(
    runs: dict[str, Recipe], teachers: list[Any], family: Path
) -> None:
    """When ``quantize`` judges, and after training: its parameters are no leaf that ModelOpt converted."""
    assert len(teachers) == 2 * len(runs)
    parent = weights_in(family)
    for teacher in teachers:
        own = {n: t for n, t in teacher.state_dict().items() if isinstance(t, Tensor) and n in parent}
        assert bits(own) == bits(parent)
        assert not any("quantizer" in name for name, _ in teacher.named_modules())
        assert not teacher.training and not any(
            p.requires_grad or p.grad is not None for p in teacher.parameters()
        )


def test_another_teacher_is_the_one_that_the_recipe_names(
    make: Make, family: Path, runs: dict[str, Recipe], tmp_path: Path
) -> None:
    recipe = make(tmp_path / "run", teacher={"checkpoint": str(runs["fp8"].run_dir)})
    quantize(recipe)
    before = next(line["eval"] for line in lines(recipe.run_dir) if "eval" in line)
    assert (
        before["submodels"]["full"]["kl"]
        > 0
        == lines(runs["fp8"].run_dir)[0]["eval"]["submodels"]["full"]["kl"]
    )


@pytest.mark.parametrize("form", FORMATS)
def test_frozen_submodels_are_the_parents_and_saved_again(
    runs: dict[str, Recipe], family: Path, form: str
) -> None:
    for step in (0, 2, STEPS):
        manifest = Manifest.read(folder(runs[form], step) / FILE)
        assert (
            dict(manifest.submodels) == SUBMODELS and manifest.budgets == BUDGETS and manifest.space == SPACE
        )
    assert not any("budget_router" in name for name in weights_of(student(runs[form], STEPS).chunks[0]))
    assert not any("router" in line for line in lines(runs[form].run_dir))
    assert {line["router_loss"] for line in lines(runs[form].run_dir) if "step" in line} == {None}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


@pytest.mark.parametrize("form", FORMATS)
def test_the_log_tells_the_story_in_order(runs: dict[str, Recipe], form: str) -> None:
    found = lines(runs[form].run_dir)
    kinds = [next(iter(line)) for line in found]
    assert kinds == [
        "eval",
        "calibration",
        "eval",
        "step",
        "step",
        "step",
        "eval",
        "step",
        "step",
        "step",
        "eval",
    ]
    evals = [line["eval"] for line in found if "eval" in line]
    assert [(e["step"], e["tokens"], e["weights"]) for e in evals] == [
        (0, 0, "fp32"), (0, 0, form), (3, 3 * 64, form), (6, 6 * 64, form),
    ]  # fmt: skip
    for e in evals:
        assert list(e["submodels"]) == list(SUBMODELS)
        assert all(r.keys() == {"loss", "tokens", "kl"} for r in e["submodels"].values())
    assert evals[0]["submodels"]["full"]["kl"] == 0.0 < evals[1]["submodels"]["full"]["kl"]
    assert [line["step"] for line in found if "step" in line] == list(range(1, STEPS + 1))
    assert not any(line.get("skipped") for line in found)


# --- training rounds to what is stored ---


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_exported_is_what_training_multiplies_with(
    runs: dict[str, Recipe], tmp_path: Path, form: str
) -> None:
    """Every weight of every submodel, as the linears of the student hand them to a matrix product."""
    model = student(runs[form], STEPS)
    (chunk,), amax = model.chunks, read_amax(folder(runs[form]))
    multiplied: dict[str, Tensor] = {}
    for name, module in chunk.named_modules():
        if hasattr(module, "weight_quantizer"):
            hook = module.weight_quantizer.register_forward_hook
            hook(lambda _, __, out, n=f"{name}.weight": multiplied.__setitem__(n, out.detach().clone()))
    with torch.no_grad(), running(chunk, one_hot(SPACE, SUBMODELS["medium"], torch.float32)):
        chunk(torch.arange(16)[None], torch.arange(16)[None], None)
    raw = weights_in(folder(runs[form]))
    wanted = {n: fake_quantise(_format(runs[form]), raw[n], a.weight) for n, a in amax.items()}
    assert multiplied.keys() == amax.keys() and bits(multiplied) == bits(wanted)
    plain = open_torch_dist(
        folder(runs[form]), replace(Manifest.read(folder(runs[form]) / FILE), quantised=None), None
    )
    for source, kind in ((open_stored(runs[form].run_dir), "stored"), (plain, "plain")):
        to_hf(source, [Request(tmp_path / kind / name, name) for name in SUBMODELS])
    for name, spec in SUBMODELS.items():
        assert_rounded(
            *(stored(tmp_path / kind / name) for kind in ("stored", "plain")), amax, spec, _format(runs[form])
        )


def assert_rounded(
    found: Mapping[str, Tensor],
    plain: Mapping[str, Tensor],
    amax: Mapping[str, Amax],
    spec: SubmodelSpec,
    form: Format,
) -> None:
    """A directory holds the numbers of another, each rounded under the magnitude of the weight that it is a part of."""
    of, names, count = origin(SPACE, spec), megatron_names(SHAPE), 0
    for key, tensor in plain.items():
        own = amax.get(names.get(of(key), ""))
        if own is None:
            assert bits({key: found[key]}) == bits({key: tensor})
            continue
        count += 1
        parts = {p.suffix: found[key.removesuffix("weight") + p.suffix] for p in form.parts}
        wanted = fake_quantise(form, tensor, own.weight)
        assert bits({key: dequantise(form, parts, tensor.dtype)}) == bits({key: wanted}), key
    assert count >= 2 + 2 * (3 + 1) + 4 + 2, "those of the smallest submodel"


def _format(recipe: Recipe) -> Format:
    quantised = Manifest.read(folder(recipe) / FILE).quantised
    assert quantised is not None
    return quantised.format


# --- routers ---


def test_a_router_may_go_on_learning(make: Make, tmp_path: Path) -> None:
    """From where training left it, on quantised leaves; the family is what it chooses in the end."""
    router = {"frozen": False, "inner_size": 16}
    elastic = make(tmp_path / "elastic", router=router).model_copy(update={"quantize": None})
    train(elastic)
    recipe = make(
        tmp_path / "run", router=router, model={"dtype": "fp32", "checkpoint": str(elastic.run_dir)}
    )
    assert train(recipe).step == STEPS
    started, ended = (router_of(student(recipe, step)) for step in (0, STEPS))
    path = folder(elastic)
    assert bits(started) == bits(router_of(loaded(elastic, path))) and bits(started) != bits(ended)
    found = lines(recipe.run_dir)
    assert all(line["router_loss"] is not None for line in found if "step" in line)
    assert [line["router"]["step"] for line in found if "router" in line] == [3, STEPS]
    manifest, first = (Manifest.read(folder(recipe, step) / FILE) for step in (STEPS, 0))
    assert manifest.quantised == first.quantised is not None and manifest.budgets == BUDGETS
    assert dict(first.submodels) == dict(Manifest.read(path / FILE).submodels)
    assert read_amax(folder(recipe)) == read_amax(folder(recipe, 0))


def loaded(recipe: Recipe, path: Path) -> Any:
    """The student of an ordinary run."""
    source = parent_source(recipe)
    model = build_student(recipe, source, SPACE)
    distributed.load(path, model.chunks, optimizer=model.optimizer)
    return model


def router_of(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.router.named_parameters()}


def test_a_frozen_router_without_quantisation_keeps_the_widths_too(
    write_recipe: Callable[..., Path], make: Make, family: Path, tmp_path: Path
) -> None:
    recipe = make(tmp_path / "run", router={"frozen": True}).model_copy(update={"quantize": None})
    assert train(recipe).step == STEPS
    manifest = Manifest.read(folder(recipe) / FILE)
    assert manifest.quantised is None and dict(manifest.submodels) == SUBMODELS
    assert not (folder(recipe) / "amax.safetensors").exists()
    found = lines(recipe.run_dir)
    assert [line["eval"]["step"] for line in found if "eval" in line] == [3, 6]
    assert not any("weights" in line.get("eval", {}) for line in found)


def test_widths_are_frozen_at_what_the_checkpoint_has(make: Make, tmp_path: Path) -> None:
    """A family whose budgets the checkpoint does not have cannot be trained frozen."""
    budgets = {
        "full": {"metric": "active_params", "target": 1.0},
        "tiny": {"metric": "active_params", "target": 0.4},
    }
    with pytest.raises(UserError, match=r"budgets\.tiny") as caught:
        train(make(tmp_path / "run", budgets=budgets))
    assert "\n" not in str(caught.value) and not (tmp_path / "run/checkpoints").exists()


def test_every_budget_counts_tokens_alike(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks sum what their experts got in one collective, so the whole model's counts have the type of a submodel's."""
    counts: dict[str, list[tuple[torch.dtype, float]]] = {}
    finish = ForwardStep.finish

    def watch(step: ForwardStep) -> None:
        finish(step)
        routers = [m for m in step.submodels[0].model.modules() if hasattr(m, "local_tokens_per_expert")]
        counts[name] = [
            (m.local_tokens_per_expert.dtype, float(m.local_tokens_per_expert.sum())) for m in routers
        ]

    monkeypatch.setattr(ForwardStep, "finish", watch)
    whole = next(name for name, spec in SUBMODELS.items() if spec == SPACE.full())
    for name in (whole, next(name for name in SUBMODELS if name != whole)):
        recipe = make(tmp_path / name, quantize={"format": "fp8"})
        stage = recipe.stages[0].model_copy(update={"budget_probs": {name: 1.0}, "tokens": 1})
        train(recipe.model_copy(update={"stages": (stage,)}))
    # excess over the fair share: it adds up to nothing
    assert counts[whole] and {each for found in counts.values() for each in found} == {(torch.float64, 0.0)}
