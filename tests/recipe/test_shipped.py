"""The recipes of this repository, their schemas, their sources, and their agreement with `elastic_megatron.space`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from elastic_megatron.checkpoint.quantised_layers import checked_of
from elastic_megatron.cost.layout import check_layout
from elastic_megatron.quantization.formats import FORMATS
from elastic_megatron.quantization.presets import PRESETS
from elastic_megatron.recipe import Chain, Cluster, Recipe, dump, elastic, json_schema, load, load_jobs, model
from elastic_megatron.recipe.deploy import Quantize
from elastic_megatron.recipe.document import Node
from elastic_megatron.recipe.gpus import GPUS
from elastic_megatron.recipe.load import KINDS, open_file, read
from elastic_megatron.space import AXIS_NAMES, ElasticSpace, ParentShape
from elastic_megatron.space.budget import METRICS, UNITS

RECIPES = Path(__file__).parents[2] / "recipes"
FILES = sorted(path for path in RECIPES.rglob("*.yaml"))
CLUSTERS = [path for path in FILES if path.parent.name == "clusters"]
CHAINS = [path for path in FILES if path.name == "chain.yaml"]
# tiny_cpu/base.yaml is only part of a recipe.
WHOLE = [path for path in FILES if path not in (*CLUSTERS, *CHAINS, RECIPES / "tiny_cpu/base.yaml")]
NANO, V2, TINY = (RECIPES / name for name in ("nemotron3_nano_30b", "nemotron_nano_v2_12b", "tiny_cpu"))
FOLDERS = (TINY, NANO, V2)


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def kind_of(path: Path) -> str:
    return "cluster" if path in CLUSTERS else "chain" if path in CHAINS else "recipe"


def sizes_of(folder: Path) -> ParentShape:
    sizes = load(folder / ("parent.yaml" if folder == TINY else "plan.yaml")).model.sizes
    assert sizes is not None
    return ParentShape(**sizes.model_dump())


def test_the_folders_hold_what_their_readers_expect() -> None:
    common = {"base", "rank", "stage1", "stage2", "export", "chain"}
    held = {folder: {path.stem for path in folder.glob("*.yaml")} for folder in FOLDERS}
    quantised = {"ptq_fp8", "qad_nvfp4", "export_nvfp4"}
    assert held[TINY] == common | quantised | {"parent", "elastic"}
    assert held[NANO] == common | quantised | {"plan"}
    assert held[V2] == common | {"plan"}
    assert {path.stem for path in CLUSTERS} == {"example", "local"}


@pytest.mark.parametrize("path", WHOLE, ids=name_of)
def test_shipped_recipe_loads_and_stays_in_the_repository(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any variable of the environment."""
    for name in ("NANO_30B_HF", "DATA", "HOME", "USER"):
        monkeypatch.delenv(name, raising=False)
    assert "${" not in path.read_text(encoding="utf-8")
    assert load(path).run_dir.is_relative_to(RECIPES.parent / "runs")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_shipped_file_names_the_schema_of_its_kind(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    prefix = "# yaml-language-server: $schema="
    assert first.startswith(prefix)
    named = (path.parent / first.removeprefix(prefix)).resolve()
    assert named == (RECIPES / f"{kind_of(path)}.schema.json").resolve()


@pytest.mark.parametrize("kind", KINDS)
def test_schema_file_is_up_to_date(kind: str) -> None:
    """If not: `elastic-megatron recipe schema KIND > recipes/KIND.schema.json`."""
    written = json.loads((RECIPES / f"{kind}.schema.json").read_text(encoding="utf-8"))
    assert written == json_schema(KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_schema_describes_every_key(kind: str) -> None:
    schema = json_schema(KINDS[kind])
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False and "required" not in section
        for key, value in section["properties"].items():
            assert value.get("description") or "$ref" in value, key
    assert "extends" in schema["properties"]


def test_schema_bounds_numbers() -> None:
    assert json_schema()["$defs"]["Stage"]["properties"]["tokens"]["exclusiveMinimum"] == 0


@pytest.mark.parametrize("path", WHOLE, ids=name_of)
def test_shipped_widths_are_legal(path: Path) -> None:
    space, parent = load(path).space, sizes_of(path.parent)
    built = ElasticSpace.build(parent, space.choices, space.lanes, space.granule, space.per_layer)
    assert set(built.axes) == set(space.choices)


# The folders' sources of numbers: what each says a value is from.
MARKS = {NANO: r"(paper|NE|model|QAD|MO|ours)\b", V2: r"(NE|model|ours)\b"}
# Names and places are no values of the method.
UNMARKED = {"extends", "name", "job", "run_dir", "stop_after", "path", "hf", "checkpoint", "elastic",
            "slices", "submodels", "cluster"}  # fmt: skip


def leaves(node: Node, above: tuple[tuple[str, Node], ...] = ()) -> Iterator[tuple[tuple[str, Node], ...]]:
    """Every scalar or list of scalars, as the keys that lead to it with their nodes."""
    match node.value:
        case dict() as entries:
            for key, child in entries.items():
                yield from leaves(child, (*above, (key, child)))
        case list() as items if any(isinstance(item.value, dict) for item in items):
            for item in items:
                yield from leaves(item, above)
        case _:
            yield above


@pytest.mark.parametrize("path", [p for p in WHOLE if p.parent in MARKS], ids=name_of)
def test_every_value_carries_its_source(path: Path) -> None:
    """On its line, or on that of a section around it; the legend in base.yaml explains every mark that is used."""
    text = path.read_text(encoding="utf-8").splitlines()
    legend = (path.parent / "base.yaml").read_text(encoding="utf-8")
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    opened = open_file(str(path), [], "recipe")
    assert opened is not None
    for steps in leaves(opened.root):
        places = [node.mark.where.rsplit(":", 2) for _, node in steps]
        if not places or Path(places[-1][0]) != path or steps[0][0] not in own:
            continue  # inherited, and looked at in its own file
        if steps[-1][0] in UNMARKED or steps[-1][1].value is None:
            continue
        lines = [text[int(line) - 1] for file, line, _ in places if Path(file) == path]
        found = [match[1] for line in lines if (match := re.search(rf"# {MARKS[path.parent]}", line))]
        assert found, f"{path.name}: {'.'.join(key for key, _ in steps)}"
        assert all(re.search(rf"^#   {mark} ", legend, re.MULTILINE) for mark in found)


def stages(*, tokens: tuple[float, float], sizes: tuple[int, int], probs: dict[str, float]) -> dict[str, Any]:
    return {
        "stages.0.tokens": tokens[0], "stages.0.seq_length": 8192, "stages.0.global_batch_size": sizes[0],
        "stages.0.budget_probs": "uniform",
        "stages.1.tokens": tokens[1], "stages.1.seq_length": 49152, "stages.1.global_batch_size": sizes[1],
        "stages.1.budget_probs": probs,
    }  # fmt: skip


BOTH = {
    "rank.samples": 1024, "rank.seq_length": 8192,
    "router.lr": 1e-2, "router.tau.start": 1.0, "router.tau.end": 0.05,
    "router.logit_scale.start": 1.0, "router.logit_scale.end": 10.0, "router.inner_size": 256, "router.loss_weight": 1.0,
    "optimizer.warmup_steps": 60, "loss.kind": "forward_kl", "loss.ce_weight": 0.0, "loss.temperature": 1.0,
    "teacher": {"top_k": 64, "cache_only": False}, "model.dtype": "bf16",
}  # fmt: skip
# The numbers of arXiv 2605.07182 and 2511.16664, written down a second time.
PUBLISHED: dict[Path, dict[str, Any]] = {
    NANO: BOTH
    | stages(tokens=(100e9, 60e9), sizes=(1536, 512), probs={"30b": 0.5, "23b": 0.3, "12b": 0.2})
    | {
        "optimizer.lr": 1e-4,
        "data.train.0.weight": 0.7,
        "data.train.1.weight": 0.3,
        "budgets.30b": {"metric": "active_params", "target": 1.0, "unit": "ratio"},
        "budgets.23b": {"metric": "active_params", "target": 2.8e9, "unit": "absolute"},
        "budgets.12b": {"metric": "active_params", "target": 2.0e9, "unit": "absolute"},
    },
    V2: BOTH
    | stages(tokens=(65e9, 45e9), sizes=(1536, 512), probs={"12b": 0.5, "9b": 0.3, "6b": 0.2})
    | {"optimizer.lr": 9e-5},
}
QAD = {
    "quantize.format": "nvfp4", "stages.0.tokens": 5e9, "stages.0.seq_length": 49152, "loss.kind": "forward_kl",
    "loss.ce_weight": 0.0, "loss.temperature": 1.0, "optimizer.schedule": "constant", "optimizer.lr": 5e-6,
    "optimizer.warmup_steps": 0,
}  # fmt: skip
# What the official low-precision checkpoints of the Nano 30B leave in BF16, by preset.
OFFICIAL = {"preset": "mamba_moe_aggressive", "keep_feeding_mamba": True, "keep": []}


def value(recipe: Recipe, dotted: str) -> Any:
    found: Any = recipe.model_dump(mode="json", exclude_none=True)
    for key in dotted.split("."):
        found = found[int(key) if isinstance(found, list) else key]
    return found


@pytest.mark.parametrize("name", ["rank", "stage1", "stage2", "plan"])
@pytest.mark.parametrize("folder", PUBLISHED, ids=name_of)
def test_published_numbers_are_in_every_recipe_of_the_chain(folder: Path, name: str) -> None:
    recipe = load(folder / f"{name}.yaml")
    assert {key: value(recipe, key) for key in PUBLISHED[folder]} == PUBLISHED[folder]


def test_quantised_distillation_and_ptq_have_their_published_numbers() -> None:
    qad, ptq = load(NANO / "qad_nvfp4.yaml"), load(NANO / "ptq_fp8.yaml")
    assert {key: value(qad, key) for key in QAD} == QAD
    assert len(qad.stages) == 1 and (qad.job, ptq.job) == ("train", "quantize")
    calibration = {"samples": 1024, "seq_length": 8192, "micro_batch_size": 1}
    for recipe, form in ((qad, "nvfp4"), (ptq, "fp8")):
        assert value(recipe, "quantize") == {"format": form, **OFFICIAL, **calibration}


@pytest.mark.parametrize("folder", [NANO, TINY], ids=name_of)
def test_quantised_students_are_taught_by_the_sorted_parent(folder: Path) -> None:
    trained, ranked = load(folder / "stage2.yaml"), load(folder / "rank.yaml")
    for name in ("qad_nvfp4", "ptq_fp8"):
        recipe = load(folder / f"{name}.yaml")
        assert recipe.model.checkpoint == trained.run_dir and recipe.teacher.checkpoint == ranked.run_dir
        assert value(recipe, "quantize").items() >= OFFICIAL.items()
    assert set(load(folder / "qad_nvfp4.yaml").budgets) == set(trained.budgets)
    assert load(folder / "qad_nvfp4.yaml").router_frozen and not trained.router_frozen


def test_the_tiny_family_is_quantised_on_few_tokens() -> None:
    family, qad = load(TINY / "elastic.yaml"), load(TINY / "qad_nvfp4.yaml")
    seen, more = (
        sum(stage.steps * stage.tokens_per_step for stage in recipe.stages) for recipe in (family, qad)
    )
    assert more <= 0.05 * seen


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_both_stages_are_one_run(folder: Path) -> None:
    """They differ in what ends the job, and in how it is laid out; so the second resumes what the first began."""
    first, second = load(folder / "stage1.yaml"), load(folder / "stage2.yaml")
    differing = {key for key in Recipe.model_fields if getattr(first, key) != getattr(second, key)}
    assert {"stop_after"} <= differing <= {"stop_after", "parallel", "slurm"}
    assert (first.stop_after, second.stop_after) == (first.stages[0].name, None)
    assert first.last_step == first.stages[0].steps < second.last_step == second.total_steps


@pytest.mark.parametrize("path", CHAINS, ids=name_of)
def test_chain_passes_each_result_to_the_next_job(path: Path) -> None:
    chain = load_jobs(path)
    before = {"stage1": "rank", "stage2": "stage1", "export": "stage2"}
    before |= {"rank": "parent"} if path.parent == TINY else {}
    before |= {"qad": "stage2", "pack": "qad"} if path.parent != V2 else {}
    names = {job.name for job in chain.jobs}
    assert names == set(before) | set(before.values())
    for job in chain.jobs:
        assert job.after == ((before[job.name],) if job.name in before else ())
        source = before.get(job.name if job.name != "stage2" else "stage1")  # which it resumes
        assert source is None or job.recipe.model.checkpoint == chain.job(source).recipe.run_dir
    exports = [job.recipe.export for job in chain.jobs if job.recipe.export is not None]
    for export in exports:
        assert set(export.submodels) <= set(chain.job("stage2").recipe.budgets)
    assert (
        len({export.elastic for export in exports})
        == len({export.slices for export in exports})
        == len(exports)
    )


@pytest.mark.parametrize("path", CHAINS, ids=name_of)
def test_layouts_of_chains_fit(path: Path) -> None:
    """The model, each submodel, the stages that a job trains, and NVFP4's blocks of 16 in every rank's share."""
    for job in load_jobs(path).jobs:
        recipe, shape = job.recipe, sizes_of(path.parent)
        if recipe.job == "export":
            continue
        space = recipe.space
        family = (
            ElasticSpace.build(shape, space.choices, space.lanes, space.granule) if recipe.budgets else None
        )
        trained = recipe.stages if recipe.job == "train" else ()
        rest = checked_of(recipe, shape, frozen=False)
        assert check_layout(shape, family, recipe.parallel, trained, **rest) == [], job.name
        assert (rest.get("blocks") == 16) is (job.name == "qad")
        if path.parent == TINY:
            continue
        parallel, expert = recipe.parallel, recipe.parallel.expert_tensor or recipe.parallel.tensor
        shards = {"ffn_hidden_size": parallel.tensor, "moe_ffn_hidden_size": expert, "hidden_size": 1}
        for axis, ranks in shards.items():
            widths = space.choices.get(axis, (shape.size(axis),))
            assert all(width % (16 * ranks) == 0 for width in widths), (job.name, axis)


def test_the_tiny_stages_draw_what_elastic_draws() -> None:
    """Smaller micro-batches for more ranks: the same steps, the same draws."""
    one, two = load(TINY / "elastic.yaml"), load(TINY / "stage2.yaml")
    layout = {"stages", "parallel", "checkpoint", "slurm"}
    assert {k for k in Recipe.model_fields if getattr(one, k) != getattr(two, k)} <= layout
    for a, b in zip(one.stages, two.stages, strict=True):
        same = {"micro_batch_size": b.micro_batch_size, "samples_per_draw": b.samples_per_draw}
        assert a.model_copy(update=same) == b and a.draw_size == b.draw_size


def test_nano_30b_is_the_published_model() -> None:
    pattern = sizes_of(NANO).hybrid_layer_pattern
    assert [pattern.count(symbol) for symbol in "ME*"] == [23, 23, 6]
    assert [index for index, symbol in enumerate(pattern) if symbol == "*"] == [5, 12, 19, 26, 33, 42]


def test_nano_v2_12b_is_the_published_model() -> None:
    assert [sizes_of(V2).hybrid_layer_pattern.count(symbol) for symbol in "M-*"] == [28, 28, 6]


def cluster(path: Path, *overrides: str) -> Cluster:
    problems: list[str] = []
    document = read(Cluster, str(path), overrides, problems)
    assert document is not None and document.value is not None and not problems, problems
    return document.value


@pytest.mark.parametrize("path", CLUSTERS, ids=name_of)
def test_shipped_clusters_load_and_dump(path: Path, tmp_path: Path) -> None:
    found = cluster(path)
    (tmp_path / "again.yaml").write_text(dump(found))
    assert cluster(tmp_path / "again.yaml") == found


def test_the_example_shows_every_key_of_a_cluster_file_and_every_container(tmp_path: Path) -> None:
    """Also those behind a #, and each is valid as it stands."""
    text = (RECIPES / "clusters/example.yaml").read_text(encoding="utf-8")
    shown = set(re.findall(r"^(?:# )?([a-z_]+):", text, re.MULTILINE))
    assert shown == set(Cluster.model_fields)
    assert set(re.findall(r"^(?:#   |  )runtime: (\w+)", text, re.MULTILINE)) >= {
        "pyxis",
        "apptainer",
        "none",
    }
    assert "docker" in text and all(name in text for name in GPUS)
    body = text[text.index("account:") :]
    containers = re.split(r"^(?=# container:)", body, flags=re.MULTILINE)
    head, *alternatives = containers
    last, _, tail = alternatives[-1].partition("\n\n")
    (tmp_path / "job.sbatch").write_text("")
    for chosen in ("", *alternatives[:-1], last):
        before = head if not chosen else head[: head.index("container:")]
        lines = (before + "\n" + chosen + "\n" + tail).splitlines()
        file = tmp_path / "cluster.yaml"
        file.write_text("\n".join(re.sub(r"^# ?", "", line) for line in lines))
        cluster(file)


def test_chains_are_chains() -> None:
    assert all(set(yaml.safe_load(path.read_text())) == set(Chain.model_fields) for path in CHAINS)


def test_names_agree_with_the_space() -> None:
    axes = json_schema()["$defs"]["Space"]["properties"]["choices"]["propertyNames"]["enum"]
    assert set(axes) == set(AXIS_NAMES)
    assert set(model.Sizes.model_fields) == {field.name for field in dataclasses.fields(ParentShape)}
    members = get_args(get_args(elastic.Budget)[0])
    metrics = [metric for member in members for metric in get_args(member.model_fields["metric"].annotation)]
    assert sorted(metrics) == sorted(METRICS)
    assert get_args(elastic.BudgetBase.model_fields["unit"].annotation) == UNITS


def test_formats_and_presets_are_those_that_are_built() -> None:
    fields = Quantize.model_fields
    assert get_args(fields["preset"].annotation) == tuple(PRESETS)
    assert set(get_args(fields["format"].annotation)) == {form.name for form in FORMATS.values()}
    assert all(set(preset.configs) == {form.name for form in FORMATS.values()} for preset in PRESETS.values())
