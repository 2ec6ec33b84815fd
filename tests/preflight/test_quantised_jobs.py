"""Jobs that quantise: every impossible setting is one finding whose remedies mend it, and what they leave behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chain_files import (
    CHAIN,
    SHAPE,
    assert_one_finding_that_is_mended,
    findings,
    remedies,
    write_chain,
    write_model,
    write_quantised_chain,
)
from test_chain_families import store

from elastic_megatron.checkpoint.hf_quantised import FILE, KEY, stored_bytes
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.quantised_plan import planned_by
from elastic_megatron.cost import account
from elastic_megatron.cost.work import Fed, forward_flops
from elastic_megatron.preflight.blocks import refused_at_once
from elastic_megatron.preflight.disk import checkpoint_bytes, export_bytes
from elastic_megatron.preflight.family import Families
from elastic_megatron.preflight.memory import fullest
from elastic_megatron.preflight.work import work
from elastic_megatron.recipe import load_jobs
from elastic_megatron.recipe.deploy import Quantize
from elastic_megatron.space import Budget, ElasticSpace, SubmodelSpec

TORN = "space.choices.moe_ffn_hidden_size=[48,128]"
# overrides of a chain without findings -> jobs, what their one finding says
SETTINGS: dict[str, tuple[list[str], str, str]] = {
    "samples": (["ptq.quantize.samples=63", "ptq.slurm.nodes=2"], "ptq",
                "quantize: samples=63 is not a multiple of micro_batch_size 1 x 4 data-parallel ranks"),
    "samples of training": (["qad.quantize.samples=63", "qad.quantize.micro_batch_size=2"], "qad",
                            "quantize: samples=63 is not a multiple of micro_batch_size 2 x 2 data-parallel ranks"),
    "sequence": (["ptq.quantize.seq_length=255"], "ptq", "quantize: seq_length=255 is not a multiple of 2"),
    "positions": (["qad.quantize.seq_length=8192"], "qad", "quantize.seq_length=8192 is longer than"),
    "modules": (["qad.quantize.keep=[lm_head,'backbone.layers.9.*']"], "qad",
                "quantize.keep: 'backbone.layers.9.*' is no linear, convolution or embedding of a model of 8 layers"),
    "budgets": (["ptq.budgets={large: {metric: active_params, target: 1.0}, tiny: {metric: active_params, target: 0.5}}"],
                "ptq", "budgets.tiny: the model has no submodel of this name, only large, small"),
    "frozen widths": (["train.router.frozen=true"], "train", "budgets.large: the model has no submodel of this name, only"),
    "blocks": ([f"{job}.{TORN}" for job in ("rank", "train", "qad")], "ptq, qad",
               "NVFP4 takes input columns in blocks of 16: moe_ffn_hidden_size=48 leaves 24 in each of 2 parts"),
    "memory": (["ptq.quantize.micro_batch_size=32", "ptq.quantize.seq_length=4096"], "ptq", "most of it logits"),
    "memory of training": (["qad.stages.0.micro_batch_size=16", "qad.stages.0.seq_length=4096"], "qad",
                           "most of it activations"),
    "time": (["ptq.quantize.samples=65536", "ptq.slurm.time=0:01:00"], "ptq", "and a quantize job begins anew each time"),
}  # fmt: skip
MAY_BE_MEANT = {"positions", "memory", "memory of training", "time"}


def here(folder: Path, overrides: list[str]) -> list[str]:
    """Overrides with their paths under ``folder``; those of the command line start from the working directory."""
    return [
        o.replace("runs/", f"{folder}/runs/").replace("hf: parent", f"hf: {folder}/parent") for o in overrides
    ]


def test_the_chain_itself_has_no_findings(tmp_path: Path) -> None:
    assert findings(write_quantised_chain(tmp_path)) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_an_impossible_setting_is_one_finding_and_its_remedies_mend_it(tmp_path: Path, name: str) -> None:
    overrides, job, says = SETTINGS[name]
    chain, overrides = write_quantised_chain(tmp_path), here(tmp_path, overrides)
    assert_one_finding_that_is_mended(chain, overrides, job, says, meant=name in MAY_BE_MEANT)


def test_a_torn_width_is_mended_where_it_is_trained(tmp_path: Path) -> None:
    """The job that quantises cannot choose other widths, and says so."""
    chain = write_quantised_chain(tmp_path)
    torn = [f"{job}.{TORN}" for job in ("rank", "train", "qad")]
    (found,) = findings(chain, *torn)
    assert "multiples of 32 would do" in found.text and "train with such space.choices" in found.text
    assert "set space.choices" not in found.text
    mended = [override.replace("48", "64") for override in torn]
    assert findings(chain, *mended) == []


@pytest.mark.parametrize(
    "choice", ["preset=mamba_moe_conservative", "keep=['*.layers.0.mixer.in_proj','*.layers.*.mixer.*_proj']"]
)  # fmt: skip
def test_widths_of_weights_that_stay_as_they_are_may_be_torn(tmp_path: Path, choice: str) -> None:
    """72 heads of 12 channels in 4 groups: 216 columns a group, which no block of 16 divides."""
    chain, shape = write_quantised_chain(tmp_path), replace(SHAPE, mamba_head_dim=12)
    write_model(tmp_path / "parent", shape)
    torn = [f"{job}.space.choices.mamba_num_heads=[24,32]" for job in ("rank", "train", "qad")]
    (found,) = findings(chain, *torn)
    assert found.job == "ptq, qad" and "mamba_num_heads=24 leaves 72 in each of 4 parts" in found.text
    assert findings(chain, *torn, f"ptq.quantize.{choice}", f"qad.quantize.{choice}") == []


def test_the_preset_decides_about_attention(tmp_path: Path) -> None:
    chain = write_quantised_chain(tmp_path)
    write_model(tmp_path / "parent", replace(SHAPE, kv_channels=24))
    heads = [f"{job}.space.choices.num_attention_heads=[4,16]" for job in ("rank", "train", "qad")]
    assert findings(chain, *heads) == []
    (found,) = findings(chain, *heads, "ptq.quantize.preset=default")
    assert found.job == "ptq" and "num_attention_heads=" in found.text


@pytest.mark.parametrize("torn", [False, True])
def test_of_a_trained_family_the_widths_in_use_count(tmp_path: Path, torn: bool) -> None:
    chain = write_quantised_chain(tmp_path)
    space = ElasticSpace.build(SHAPE, {"hidden_size": [120, 128, 256]}, granule={"hidden_size": 8})
    tiny = SubmodelSpec.of({"hidden_size": 120 if torn else 128})
    store(
        tmp_path / "runs/train",
        Manifest(SHAPE, space, (Budget("tiny", "total_params", 0.5),), {"tiny": tiny}),
    )
    alone = [f"slurm.cluster={tmp_path}/cluster.yaml"]
    found = findings(chain.with_name("ptq.yaml"), *alone)
    assert [f.text.partition(";")[0] for f in found] == (
        [
            "NVFP4 takes input columns in blocks of 16: hidden_size=120 leaves 120 of them, multiples of 16 would do"
        ]
        if torn
        else []
    )


def test_recipes_are_refused_as_soon_as_they_are_loaded(tmp_path: Path) -> None:
    """As far as their model can be read, and for what they say of blocks and modules alone."""
    path = write_quantised_chain(tmp_path)
    torn = [f"{job}.{TORN}" for job in ("rank", "train", "qad")]
    assert refused_at_once(load_jobs(path)) == refused_at_once(load_jobs(path, ["qad.slurm.nodes=3"])) == []
    lines = refused_at_once(load_jobs(path, torn))
    assert [line.partition(": NVFP4 takes")[0] for line in lines] == [
        str(tmp_path / f"{n}.yaml") for n in ("ptq", "qad")
    ]
    assert "multiples of 32 would do; set quantize.format=fp8" in lines[0]
    (line,) = refused_at_once(load_jobs(path, ["ptq.quantize.keep=[x]"]))
    assert line.startswith(f"{tmp_path}/ptq.yaml: quantize.keep: 'x' is no linear")
    alone = [f"slurm.cluster={tmp_path}/cluster.yaml", "quantize.keep=[x]"]
    assert refused_at_once(load_jobs(tmp_path / "ptq.yaml", alone)) == [], "its model is not there yet"


def test_a_quantised_model_is_not_quantised_again(tmp_path: Path) -> None:
    path = write_quantised_chain(tmp_path)
    path.write_text(path.read_text().replace("qad.yaml, after: [train]", "qad.yaml, after: [ptq]"))
    again = f"qad.model.checkpoint={tmp_path}/runs/ptq"
    (found,) = findings(path, again)
    assert (
        found.job == "qad" and f"{tmp_path}/runs/ptq is quantised already, to NVFP4; start from" in found.text
    )
    plain = [again, "qad.quantize=null", "qad.router.frozen=true"]
    assert findings(path, *plain) == [], "its numbers can be trained on"
    chain = load_jobs(path, plain)
    assert Families(chain).of(chain.job("qad")).result.quantised is None


def test_a_quantised_directory_is_not_quantised_again(tmp_path: Path) -> None:
    path = write_quantised_chain(tmp_path)
    whole = [f"ptq.model={{hf: {tmp_path}/parent}}", "ptq.space=null"]
    assert findings(path, *whole) == []
    told = planned_by(Quantize(format="fp8"), SHAPE, "0.47")
    config = tmp_path / "parent" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {KEY: dict(told.config)}))
    (tmp_path / "parent" / FILE).write_text(json.dumps(told.file))
    (found,) = findings(path, *whole)
    assert found.job == "ptq" and f"{tmp_path}/parent is quantised already, to FP8" in found.text


def test_random_weights_are_not_quantised(tmp_path: Path) -> None:
    sizes = {name: value for name, value in SHAPE.to_dict().items() if name != "num_layers"}
    random = [
        "train.model.checkpoint=null",
        f"train.model.sizes={json.dumps(sizes)}",
        "train.loss.kind=cross_entropy",
    ]
    quantised = ["train.quantize={format: fp8, seq_length: 256, samples: 64}", "train.router.frozen=false"]
    path = write_chain(tmp_path)
    (found,) = findings(path, *random, *quantised)
    assert found.job == "train" and "quantize has no weights to start from" in found.text
    assert (
        remedies(found) == [["train.quantize=null"]]
        and findings(path, *random, *quantised, *remedies(found)[0]) == []
    )


def test_training_on_quantised_leaves_needs_data(tmp_path: Path) -> None:
    (found,) = findings(write_quantised_chain(tmp_path), "qad.data.train=[]")
    assert found.job == "qad" and found.text.startswith("there is no data.train")


def test_budgets_name_submodels_of_the_model(tmp_path: Path) -> None:
    """Also where the router goes on learning: calibration feeds the submodels as they are."""
    path = write_quantised_chain(tmp_path)
    for more in ((), ("qad.router.frozen=false",)):
        (found,) = findings(path, f"qad.model.checkpoint={tmp_path}/runs/rank", *more)
        assert (
            found.job == "qad"
            and "budgets.large: the model has no submodel of this name, only the whole" in found.text
        )
        assert found.text.endswith("name the run of a trained family in model.checkpoint")


def test_teachers_of_quantised_students_need_their_vocabulary(tmp_path: Path) -> None:
    path = write_quantised_chain(tmp_path)
    store(tmp_path / "teacher", Manifest(replace(SHAPE, vocab_size=8192)))
    for job in ("ptq", "qad"):
        (found,) = findings(path, f"{job}.teacher.checkpoint={tmp_path}/teacher")
        assert found.job == job and "a vocabulary of 8192, the parent 4096" in found.text


def test_a_missing_checkpoint_is_one_finding(tmp_path: Path) -> None:
    write_quantised_chain(tmp_path)
    for name in ("ptq", "qad"):
        (found,) = findings(tmp_path / f"{name}.yaml", f"slurm.cluster={tmp_path}/cluster.yaml")
        assert found.text.startswith(f"model.checkpoint: {tmp_path}/runs/train holds no checkpoint")


@pytest.mark.parametrize("job", ["ptq", "qad"])
def test_validation_data_that_is_missing_is_one_finding(tmp_path: Path, job: str) -> None:
    (found,) = findings(
        write_quantised_chain(tmp_path), f"{job}.data.valid=[{{path: {tmp_path}/none, weight: 1}}]"
    )
    assert found.job == job and f"data.valid.0.path: {tmp_path}/none.bin is missing" in found.text


def test_jobs_of_one_run_quantise_alike(tmp_path: Path) -> None:
    path = write_quantised_chain(tmp_path)
    path.write_text(path.read_text().rstrip() + "\n  longer: {recipe: qad.yaml, after: [qad]}\n")
    longer = ["longer.stages.0.tokens=2e5", "qad.stages.0.tokens=2e5", "longer.quantize.format=fp8"]
    (found,) = [f for f in findings(path, *longer) if "format" in f.text]
    assert found.job == "longer" and "quantize.format=fp8 is nvfp4 in qad" in found.text


def test_training_goes_on_from_what_was_quantised_in_its_run_folder(tmp_path: Path) -> None:
    path = write_quantised_chain(tmp_path)
    path.write_text(path.read_text().replace("qad.yaml, after: [train]", "qad.yaml, after: [ptq]"))
    same = f"qad.run_dir={tmp_path}/runs/ptq", f"export.model.checkpoint={tmp_path}/runs/ptq"
    assert findings(path, *same) == []
    (found,) = findings(path, *same, "qad.quantize.samples=128")
    assert found.job == "qad" and found.severity == "error"
    assert (
        "quantize.samples=128 is 64 in ptq, which quantises in the same run_dir; set quantize.samples=64"
        in found.text
    )
    (found,) = findings(path, *same, "qad.quantize=null", "qad.router.frozen=true")
    assert "holds the checkpoints of job ptq, which train would take for its own" in found.text


def test_what_quantising_jobs_leave_behind(tmp_path: Path) -> None:
    chain = load_jobs(write_quantised_chain(tmp_path))
    families = Families(chain)
    family = {job.name: families.of(job) for job in chain.jobs}
    wanted = planned_by(Quantize(format="nvfp4"), SHAPE)
    for name in ("ptq", "qad"):
        result = family[name].result
        assert result.quantised == wanted and family[name].frozen
        assert list(result.submodels) == ["large", "small"] and family[name].space == family["train"].space
    assert family["train"].result.quantised is None and not family["train"].frozen
    assert family["export"].parent.quantised == wanted and family["qad"].teacher == SHAPE
    assert family["ptq"].teacher == SHAPE


def test_a_trained_familys_widths_survive_training_on_quantised_leaves(tmp_path: Path) -> None:
    chain = write_quantised_chain(tmp_path)
    space = ElasticSpace.build(SHAPE, {"hidden_size": [128, 256]})
    specs = {"large": space.full(), "small": SubmodelSpec.of({"hidden_size": 128})}
    store(tmp_path / "runs/train", Manifest(SHAPE, space, (), specs))
    jobs = load_jobs(chain.with_name("qad.yaml"), [f"slurm.cluster={tmp_path}/cluster.yaml"])
    family = Families(jobs).of(jobs.jobs[0])
    assert family.result.submodels == specs and family.space == space
    thawed = load_jobs(
        chain.with_name("qad.yaml"), [f"slurm.cluster={tmp_path}/cluster.yaml", "router.frozen=false"]
    )
    result = Families(thawed).of(thawed.jobs[0]).result
    assert result.submodels == {"large": SubmodelSpec(), "small": SubmodelSpec()}


def test_exports_of_a_quantised_family_take_what_is_stored(tmp_path: Path) -> None:
    chain = load_jobs(write_quantised_chain(tmp_path))
    job = chain.job("export")
    sizes = export_bytes(job, Families(chain).of(job))
    quantised = planned_by(Quantize(format="nvfp4"), SHAPE)
    space = ElasticSpace(SHAPE, ())
    whole = stored_bytes(quantised, space, space.full())
    assert sizes == {tmp_path / "out/elastic": whole, tmp_path / "out/slices/small": whole}
    assert whole < 0.7 * 2 * account(SHAPE).total_params
    wide = load_jobs(tmp_path / "chain.yaml", ["export.export.dtype=fp32"]).job("export")
    rest = sum(export_bytes(wide, Families(chain).of(job)).values()) - 2 * whole
    assert 0 < rest == 2 * (stored_bytes(quantised, space, space.full(), rest=4) - whole)


def test_calibration_feeds_every_submodel_and_keeps_no_optimizer(tmp_path: Path) -> None:
    chain = load_jobs(write_quantised_chain(tmp_path))
    families = Families(chain)
    ptq, qad = chain.job("ptq"), chain.job("qad")
    flops, steps, tokens = work(chain, ptq, families.of(ptq))
    assert [b.target for b in families.of(ptq).result.budgets] == [1.0, 0.7], "the first is the whole model"
    assert (flops, steps, tokens) == (2 * forward_flops(SHAPE, Fed(64, 256)), 0, 2 * 64 * 256)
    assert checkpoint_bytes(ptq, families.of(ptq)) == 2 * account(SHAPE).total_params
    trained, _, tokens = work(chain, qad, families.of(qad))
    plain = load_jobs(tmp_path / "chain.yaml", ["qad.quantize=null", "qad.router.frozen=true"])
    alone, _, same = work(plain, plain.job("qad"), Families(plain).of(plain.job("qad")))
    assert tokens == same and trained == pytest.approx(alone + flops)


def test_rounded_copies_are_counted_in_the_fullest_rank(tmp_path: Path) -> None:
    chain = load_jobs(write_quantised_chain(tmp_path))
    families = Families(chain)
    found = fullest(chain, chain.job("qad"), families.of(chain.job("qad")))
    assert found is not None and found[0] == "stages.0" and found[1].training
    names = {name for _, name in found[1].rounded}
    assert "mixer.in_proj.weight" in names and not any("linear_qkv" in name for name in names)
    calibrated = fullest(chain, chain.job("ptq"), families.of(chain.job("ptq")))
    assert calibrated is not None and calibrated[0] == "quantize" and not calibrated[1].training
    assert calibrated[1].rounded == found[1].rounded


def test_the_fullest_moment_is_not_that_of_most_tokens(tmp_path: Path) -> None:
    """Calibration reads more at a time than a step of training, and keeps nothing of it."""
    chain = load_jobs(write_quantised_chain(tmp_path), ["qad.quantize.micro_batch_size=16"])
    job = chain.job("qad")
    found = fullest(chain, job, Families(chain).of(job))
    assert found is not None and found[0] == "stages.0" and found[1].tokens < 16 * 256


def test_targets_of_frozen_submodels_are_not_judged(tmp_path: Path) -> None:
    """Their widths are chosen, whatever the recipe says they should come to."""
    path, small = write_quantised_chain(tmp_path), "qad.budgets.small.target=0.2"
    assert findings(path, small) == []
    (found,) = findings(path, small, "qad.router.frozen=false")
    assert "budgets.small.target=0.2 is below the smallest submodel" in found.text


def test_a_run_without_a_section_is_not_quantised(tmp_path: Path) -> None:
    chain = load_jobs(write_chain(tmp_path, chain=CHAIN))
    job = chain.job("train")
    found = fullest(chain, job, Families(chain).of(job))
    assert found is not None and not found[1].rounded
