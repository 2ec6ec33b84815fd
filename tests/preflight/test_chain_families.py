"""Jobs are checked against the model that they will find, and against folders, disks and containers of the cluster."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from chain_files import CHAIN, CLUSTER, RANK, SHAPE, TRAIN, findings, remedies, write_chain, write_model

from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.cost import account
from elastic_megatron.errors import UserError
from elastic_megatron.preflight.disk import export_bytes, wanted
from elastic_megatron.preflight.family import Families, own_steps
from elastic_megatron.recipe import JobChain, load_jobs
from elastic_megatron.space import Budget, ElasticSpace, SubmodelSpec

STAGE1 = TRAIN + "    stop_after: short\n"
TWO_STAGES = """
    name: toy
    cluster: cluster.yaml
    run_dir: runs
    jobs:
      rank: {recipe: rank.yaml}
      stage1: {recipe: stage1.yaml, after: [rank]}
      stage2: {recipe: train.yaml, after: [stage1]}
      export: {recipe: export.yaml, after: [stage2]}
"""


def two_stages(folder: Path) -> Path:
    chain = write_chain(folder, chain=TWO_STAGES)
    (folder / "stage1.yaml").write_text("\n".join(line[4:] for line in STAGE1.splitlines()))
    return chain


def store(root: Path, manifest: Manifest) -> None:
    """A checkpoint of a run folder, as far as its description goes."""
    folder = root / "checkpoints" / "iter_0000001"
    folder.mkdir(parents=True)
    manifest.write(folder / "elastic.json")
    (root / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("1\n")


def test_every_job_sees_what_the_one_before_it_will_have_made(tmp_path: Path) -> None:
    chain = load_jobs(write_chain(tmp_path))
    families = Families(chain)
    ranked, trained, exported = (families.of(job) for job in chain.jobs)
    assert ranked.parent.ranking is None and ranked.space is not None and ranked.teacher is None
    assert trained.parent.ranking is not None and trained.parent.space == ranked.space
    assert trained.teacher == trained.shape == SHAPE
    assert list(exported.parent.submodels) == ["large", "small"] and exported.space == trained.space
    assert [budget.name for budget in exported.parent.budgets] == ["large", "small"]


def test_the_ranking_job_fixes_lanes_for_those_after_it(tmp_path: Path) -> None:
    chain = load_jobs(write_chain(tmp_path), ["train.space.lanes.num_moe_experts=8"])
    space = Families(chain).of(chain.job("train")).space
    assert space is not None and space.lanes_of("num_moe_experts") == 4


def test_a_run_folder_passes_from_stage_to_stage(tmp_path: Path) -> None:
    path = two_stages(tmp_path)
    chain = load_jobs(path)
    assert findings(path) == []
    steps = {job.name: list(own_steps(chain, job)) for job in chain.jobs}
    whole = [(i, s.steps) for i, s in enumerate(chain.job("stage2").recipe.stages)]
    assert steps == {"rank": [], "stage1": whole[:1], "stage2": whole[1:], "export": []}
    large = ("micro_batch_size=16", "seq_length=4096")
    (found,) = findings(path, *(f"{job}.stages.0.{value}" for job in ("stage1", "stage2") for value in large))
    assert found.job == "stage1", "the second job does not run the first stage again"


def test_two_jobs_share_a_run_folder_only_one_after_the_other(tmp_path: Path) -> None:
    path = two_stages(tmp_path)
    text = path.read_text()
    path.write_text(text.replace("after: [stage1]", "after: [rank]"))
    (found,) = findings(path)
    assert found.job == "stage2" and f"{tmp_path}/runs/train is that of job stage1 too" in found.text
    assert "add stage1 to jobs.stage2.after" in found.text
    path.write_text(text.replace("after: [stage1]", "after: [rank, stage1]"))
    assert findings(path) == []


def test_two_exports_share_a_run_folder_only_one_after_the_other(tmp_path: Path) -> None:
    """Each would find the other's lock; the record of what was exported is of both."""
    path = write_chain(tmp_path)
    (tmp_path / "again.yaml").write_text((tmp_path / "export.yaml").read_text().replace("out/", "out/again/"))
    path.write_text(f"{path.read_text().rstrip()}\n  again: {{recipe: again.yaml, after: [train]}}\n")
    (found,) = findings(path)
    assert found.job == "again" and f"{tmp_path}/runs/export is that of job export too" in found.text
    path.write_text(
        path.read_text().replace("again.yaml, after: [train]", "again.yaml, after: [train, export]")
    )
    assert findings(path) == []


def test_a_run_folder_of_another_kind_of_job_is_an_error(tmp_path: Path) -> None:
    path = write_chain(tmp_path, train=TRAIN.replace("run_dir: runs/train", "run_dir: runs/rank"))
    found = findings(path)
    assert [f.job for f in found] == ["train", "export"]
    assert "holds the checkpoints of job rank, which train would take for its own" in found[0].text


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stages.0.tokens=7e5", "stages.0.tokens=700000 is 1000000 in stage1, which trains in the same run_dir"),
        ("stages.1.global_batch_size=32", "stages.1.global_batch_size=32 is 16 in stage1"),
        ("stages.0.micro_batch_size=1", "stages.0.samples_per_draw=1 is 2 in stage1"),
        ("stages.0.budget_probs={large: 1}", 'stages.0.budget_probs={"large":1.0,"small":0.0} is {"large":0.5,"small":0.5}'),
        ("seed=7", "seed=7 is 1234 in stage1"),
        ("optimizer.lr=3e-4", "optimizer.lr=0.0003 is 0.0001 in stage1"),
        ("router.tau.end=0.1", "router.tau.end=0.1 is 0.05 in stage1"),
        ("budgets.small.target=0.6", "budgets.small.target=0.6 is 0.7 in stage1"),
        ("space.choices.hidden_size=[192,256]", "space.choices.hidden_size=[192,256] is [128,256] in stage1"),
        ("loss.temperature=2.0", "loss.temperature=2.0 is 1.0 in stage1"),
        ("data.train.0.weight=2", 'data.train=[{"path":'),
        ("stop_after=short", "training ends at step 31, to which stage1 has come already; set stop_after=null"),
    ],
)  # fmt: skip
def test_jobs_of_one_run_have_one_curriculum(tmp_path: Path, override: str, says: str) -> None:
    path = two_stages(tmp_path)
    (found,) = findings(path, f"stage2.{override}")
    assert found.job == "stage2" and found.severity == "error" and says in found.text
    for way in remedies(found):
        assert findings(path, f"stage2.{override}", *way) == []


def test_jobs_of_one_run_may_differ_in_how_they_run(tmp_path: Path) -> None:
    same = ["stage2.stages.0.micro_batch_size=1", "stage2.stages.0.samples_per_draw=2"]
    same += ["stage2.stages.0.execution=masked", "stage2.loss.chunk=256", "stage2.loss.recompute=true"]
    other = ["stage2.parallel.recompute=full", "stage2.slurm.nodes=4", "stage2.checkpoint.interval=7"]
    assert findings(two_stages(tmp_path), *same, *other, "stage2.name=other", "stage2.log.interval=3") == []


def test_a_run_that_has_ended_is_not_continued(tmp_path: Path) -> None:
    (found,) = findings(two_stages(tmp_path), "stage1.stop_after=null")
    assert (
        found.job == "stage2"
        and "take this job out, or set stage1.stop_after to an earlier stage" in found.text
    )


def test_a_maker_further_down_has_to_move_up(tmp_path: Path) -> None:
    lines = CHAIN.replace(", after: [rank]", "").splitlines()
    rank = next(i for i, line in enumerate(lines) if "rank:" in line)
    lines.append(lines.pop(rank))
    found = findings(write_chain(tmp_path, chain="\n".join(lines)))
    assert [f.job for f in found] == ["train"], "the export job has nothing to add"
    assert "move job rank above train and add rank to jobs.train.after" in found[0].text


def test_an_export_is_a_model_for_jobs_after_it(tmp_path: Path) -> None:
    again = RANK.replace("hf: parent", "hf: out/elastic").replace("runs/rank", "runs/again")
    path = write_chain(tmp_path, chain=CHAIN + "      again: {recipe: again.yaml, after: [export]}\n")
    (tmp_path / "again.yaml").write_text("\n".join(line[4:] for line in again.splitlines()))
    (found,) = findings(path)
    assert found.job == "again" and "is sorted already; rank the parent it was made from" in found.text
    (found,) = findings(path, f"again.model.hf={tmp_path}/out/slices/small")
    assert "is a submodel whose widths are yet to be learnt" in found.text


def test_without_a_maker_the_checkpoint_on_disk_counts(tmp_path: Path) -> None:
    path = write_chain(tmp_path)
    alone = tmp_path / "train.yaml"
    (found,) = findings(alone, f"slurm.cluster={tmp_path}/cluster.yaml")
    assert found.text.startswith(f"model.checkpoint: {tmp_path}/runs/rank holds no checkpoint")
    space = Families(chain := load_jobs(path)).of(chain.job("rank")).space
    store(tmp_path / "runs" / "rank", Manifest(SHAPE, space, ranking="of old"))
    assert findings(alone, f"slurm.cluster={tmp_path}/cluster.yaml") == []
    cluster = f"slurm.cluster={tmp_path}/cluster.yaml"
    (found,) = findings(
        tmp_path / "rank.yaml",
        cluster,
        f"model.checkpoint={tmp_path}/runs/rank",
        "model.hf=null",
        "run_dir=again",
    )
    assert "is sorted already" in found.text


def test_submodels_of_a_stored_family_are_known_by_name_and_size(tmp_path: Path) -> None:
    write_chain(tmp_path)
    space, tiny = (
        ElasticSpace.build(SHAPE, {"hidden_size": [128, 256]}),
        SubmodelSpec.of({"hidden_size": 128}),
    )
    store(
        tmp_path / "runs/train",
        Manifest(SHAPE, space, (Budget("tiny", "total_params", 0.5),), {"tiny": tiny}),
    )
    alone, cluster = tmp_path / "export.yaml", f"slurm.cluster={tmp_path}/cluster.yaml"
    (found,) = findings(alone, cluster)
    assert found.text.endswith("there will be no small, but tiny; set export.submodels=[tiny]")
    assert findings(alone, cluster, "export.submodels=[tiny]") == []
    chain = load_jobs(alone, [cluster, "export.submodels=[tiny]"])
    sizes = export_bytes(chain.jobs[0], Families(chain).of(chain.jobs[0]))
    assert sizes == {
        tmp_path / "out/elastic": 2 * account(SHAPE).total_params,
        tmp_path / "out/slices/tiny": 2 * account(space, tiny).total_params,
    }


def test_teachers_need_the_students_vocabulary(tmp_path: Path) -> None:
    path = write_chain(tmp_path)
    store(tmp_path / "teacher", Manifest(replace(SHAPE, vocab_size=8192)))
    (found,) = findings(path, f"train.teacher.checkpoint={tmp_path}/teacher")
    assert found.job == "train" and "a vocabulary of 8192, the parent 4096" in found.text
    (found,) = findings(path, f"train.teacher.checkpoint={tmp_path}/none")
    assert found.text.startswith(f"teacher.checkpoint: {tmp_path}/none holds no checkpoint")


def test_random_weights_have_nothing_to_distil(tmp_path: Path) -> None:
    sizes = {name: value for name, value in SHAPE.to_dict().items() if name != "num_layers"}
    path = write_chain(tmp_path)
    (found,) = findings(path, "train.model.checkpoint=null", f"train.model.sizes={json.dumps(sizes)}")
    assert "distils the parent, but model.sizes starts from random weights" in found.text
    assert "set loss.kind=cross_entropy" in found.text


def test_a_disk_that_is_too_small_for_the_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = two_stages(tmp_path)
    chain = load_jobs(path, ["stage1.checkpoint.keep_last=5"])
    keeps = {"stage1": 5, "stage2": 2}
    (need,) = wanted(chain, Families(chain), keeps).values()
    (three,) = wanted(chain, Families(chain), {"stage1": 3, "stage2": 2}).values()
    usage = namedtuple("usage", "total used free")
    for free, says in (
        (need, None),
        (need - 1, "keep_last=4"),
        (three, "set stage1.checkpoint.keep_last=3"),
        (1, "free "),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(2**50, 0, free))
        found = findings(path, "stage1.checkpoint.keep_last=5")
        assert len(found) == (says is not None)
        if says is not None:
            assert found[0].severity == "error" and says in found[0].text and found[0].job == ""
        for way in remedies(found[0]) if found else ():
            assert findings(path, "stage1.checkpoint.keep_last=5", *way) == []


def test_checkpoints_that_are_there_need_no_further_room(tmp_path: Path) -> None:
    chain = load_jobs(write_chain(tmp_path))
    keeps = {"train": 2}
    (before,) = wanted(chain, Families(chain), keeps).values()
    old = tmp_path / "runs" / "train" / "checkpoints" / "iter_0000007"
    old.mkdir(parents=True)
    (old / "shard").write_bytes(bytes(1000))
    (after,) = wanted(chain, Families(chain), keeps).values()
    assert before - after == 1000


CONTAINER = """
    container:
      runtime: apptainer
      image: IMAGE
      mounts: [runs, data, parent, out]
"""


def test_containers_see_every_path(tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    path = write_chain(tmp_path, cluster=CLUSTER + CONTAINER.replace("IMAGE", str(image)))
    for name in ("runs", "out"):
        (tmp_path / name).mkdir()
    (found,) = findings(path)
    assert found.text.startswith(f"container.image: {image} does not exist")
    image.touch()
    assert findings(path) == []
    cluster = (tmp_path / "cluster.yaml").read_text()
    (tmp_path / "cluster.yaml").write_text(cluster.replace("data, ", ""))
    (found,) = findings(path)
    assert (
        found.text.endswith(f"add {tmp_path}/data to container.mounts")
        and f"{tmp_path}/data/train" in found.text
    )
    (tmp_path / "cluster.yaml").write_text(cluster.replace("data, ", "data, scratch, "))
    (found,) = findings(path)
    assert found.text.startswith(f"container.mounts: {tmp_path}/scratch does not exist here")
    (tmp_path / "scratch").mkdir()
    assert findings(path) == []
    (tmp_path / "cluster.yaml").write_text(cluster.replace(str(image), "registry.example.com/team/image:1"))
    assert findings(path) == [], "whether a registry has an image is not asked"


def test_variables_are_missed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_chain(tmp_path, cluster=CLUSTER + "    environment: [FIRST_TOKEN, SECOND_TOKEN]\n")
    monkeypatch.setenv("FIRST_TOKEN", "a secret")
    monkeypatch.delenv("SECOND_TOKEN", raising=False)
    (found,) = findings(path)
    assert found.severity == "warning" and "SECOND_TOKEN" in found.text
    assert "FIRST_TOKEN" not in found.text and "secret" not in found.text
    monkeypatch.setenv("SECOND_TOKEN", "")
    assert findings(path) == []


def test_exports_of_this_recipe_may_be_there(tmp_path: Path) -> None:
    path = write_chain(tmp_path)
    out = tmp_path / "out" / "elastic"
    write_model(out)
    (found,) = findings(path)
    assert "holds something that this recipe did not write" in found.text
    record = tmp_path / "runs" / "export" / "exports.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({str(out): {}}))
    assert findings(path) == []


def test_nothing_is_checked_twice_where_a_model_is_missing(tmp_path: Path) -> None:
    path = write_chain(tmp_path)
    (tmp_path / "parent" / "config.json").unlink()
    found = findings(path)
    assert [f.job for f in found] == ["rank"] and "config.json is missing" in found[0].text


def test_families_of_a_broken_chain_raise_the_finding(tmp_path: Path) -> None:
    path = write_chain(tmp_path)
    (tmp_path / "parent" / "config.json").unlink()
    chain: JobChain = load_jobs(path)
    with pytest.raises(UserError, match="model.hf: .*config.json is missing"):
        Families(chain).of(chain.job("export"))
