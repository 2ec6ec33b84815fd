"""Every impossible setting is one finding, and what that finding says to do mends it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from chain_files import (
    SHAPE,
    assert_one_finding_that_is_mended,
    findings,
    write_chain,
    write_data,
    write_model,
)

from elastic_megatron.cost.remedy import problems_of
from elastic_megatron.cost.setting import Setting
from elastic_megatron.preflight.memory import legal
from elastic_megatron.recipe.training import Parallel
from elastic_megatron.space import ElasticSpace

DRAWS = ("train.stages.0.samples_per_draw=4", "train.stages.1.samples_per_draw=2")
NINE = ("train.stages.0.global_batch_size=36", "train.stages.1.global_batch_size=36")
# overrides of a chain without findings -> job, what its one finding says
SETTINGS: dict[str, tuple[list[str], str, str]] = {
    "dense ranks": (["train.parallel.context=1", "train.slurm.nodes=1", "train.slurm.ranks_per_node=3",
                     "train.parallel.expert=1"], "train", "1 nodes x 3 ranks = 3 is not a multiple of tensor 2 x"),
    "expert ranks": (["train.parallel.expert=8", "train.slurm.nodes=1", *DRAWS, "train.space.lanes.num_moe_experts=8",
                      "rank.space.lanes.num_moe_experts=8"], "train", "expert_tensor 1 x expert 8 x pipeline 1 = 8"),
    "sequence parallelism": (["train.parallel.sequence=false"], "train", "parallel.tensor=2 with MoE layers"),
    "tensor": (["train.parallel.tensor=8", "train.parallel.context=1", "train.space.choices={num_moe_experts: [8,16]}",
                "train.space.lanes={num_moe_experts: 4}", "rank.space.choices={num_moe_experts: [8,16]}",
                "rank.space.lanes={num_moe_experts: 4}", "cluster.gpus_per_node=8", "rank.slurm.ranks_per_node=4",
                "train.budgets.small.target=1.0"],
               "train", "parallel.tensor=8 does not divide mamba_num_groups=4"),
    "experts": (["train.parallel.expert=3", "train.slurm.nodes=3", *NINE, "train.stages.0.samples_per_draw=6",
                 "train.stages.1.samples_per_draw=3"], "train", "parallel.expert=3 does not divide num_moe_experts=16"),
    "expert width": (["train.parallel.expert_tensor=3", "train.slurm.nodes=6", *NINE,
                      "train.stages.0.samples_per_draw=6", "train.stages.1.samples_per_draw=3"], "train",
                     "parallel.expert_tensor=3 does not divide moe_ffn_hidden_size=128"),
    "width of a submodel": (["train.parallel.expert=1", "train.parallel.expert_tensor=4",
                             "train.space.choices.moe_ffn_hidden_size=[62,128]"], "train",
                            "parallel.expert_tensor=4 does not divide moe_ffn_hidden_size=62 of a submodel"),
    "lanes of all jobs": (["rank.space.lanes.num_moe_experts=2", "train.space.lanes.num_moe_experts=2"], "rank, train",
                          "space.lanes.num_moe_experts=2 is not a multiple of parallel.expert=4"),
    "context and heads": (["train.parallel.context=16", "train.slurm.nodes=8"], "train",
                          "parallel.tensor x parallel.context = 32 does not divide mamba_num_heads=16"),
    "pipeline": (["train.parallel.pipeline=9", "train.slurm.nodes=9", "cluster.max_nodes=9"], "train",
                 "parallel.pipeline=9 is more than the 8 layers"),
    "virtual pipeline": (["train.parallel.virtual_pipeline=3", "train.parallel.pipeline=4", "train.slurm.nodes=4"],
                         "train", "parallel.pipeline=4 x virtual_pipeline=3 = 12 is more than the 8 layers"),
    "interleaved batches": (["train.parallel.virtual_pipeline=2", "train.parallel.pipeline=2", "train.slurm.nodes=4",
                             "train.stages.1.global_batch_size=6"], "train", "3 micro-batches a step"),
    "sequence": (["train.stages.0.seq_length=1022"], "train", "seq_length=1022 is not a multiple of 4"),
    "batch": (["train.stages.1.global_batch_size=15"], "train", "global_batch_size=15 is not a multiple of"),
    "batch and draws": (["train.stages.0.samples_per_draw=6", "train.stages.0.global_batch_size=30"], "train",
                        "global_batch_size=30 is not a multiple of micro_batch_size 2 x 2"),
    "batch and nodes": (["train.slurm.nodes=3", "train.stages.0.global_batch_size=36"], "train",
                        "global_batch_size=16 is not a multiple of micro_batch_size 1 x 3"),
    "calibration samples": (["rank.rank.samples=62"], "rank", "samples=62 is not a multiple of"),
    "calibration sequence": (["rank.rank.seq_length=257", "rank.parallel.context=2"], "rank", "seq_length=257"),
    "memory of logits": (["train.stages.0.micro_batch_size=16", "train.stages.0.seq_length=4096", "train.loss.chunk=32768",
                          "train.parallel.recompute=full"], "train", "most of it logits (0.9 GiB)"),
    "memory of activations": (["train.stages.1.seq_length=65536", "parent.max=65536"], "train",
                              "estimated 1.2 GiB, most of it activations (1.1 GiB)"),
    "memory of one rank": (["train.stages.1.seq_length=262144", "parent.max=262144"], "train", "more than the 3 GiB"),
    "nodes": (["train.slurm.nodes=9", *NINE], "train", "slurm.nodes=9 is more than the cluster's max_nodes=8"),
    "time": (["train.slurm.time=9:00:00"], "train", "slurm.time=9:00:00 is longer than the cluster's max_time=8:00:00"),
    "ranks of a node": (["train.slurm.ranks_per_node=8"], "train", "slurm.ranks_per_node=8 is more than"),
    "tensor across nodes": (["train.parallel.tensor=4", "train.slurm.ranks_per_node=2", "train.slurm.nodes=8"],
                            "train", "parallel.tensor=4 spans nodes of 2 ranks"),
    "positions": (["train.stages.1.seq_length=8192"], "train", "stages.1.seq_length=8192 is longer than"),
    "optimizer": (["train.parallel.distributed_optimizer=false"], "train", "parallel.distributed_optimizer is false"),
    "submodel": (["export.export.submodels=[smal]"], "export", "there will be no smal, but large, small"),
    "depth": (["rank.space.choices.num_layers=[4,8]"], "rank", "num_layers is elastic, but rank.depth is false"),
    "small budget": (["train.budgets.small.target=0.2"], "train",
                     "budgets.small.target=0.2 is below the smallest submodel, 0.3751 active_params"),
    "large budget": (["train.budgets.small.target=1e9", "train.budgets.small.unit=absolute"], "train",
                     "budgets.small.target=1e+09 is above the whole model, 6.091e+06 active_params"),
    "time of one job": (["train.slurm.time=0:06:00", "train.slurm.continuation={kind: none}",
                         "train.stages.0.tokens=1e8"], "train", "an estimated 33 minutes of work take 6 times"),
    "time of links": (["train.slurm.time=0:06:00", "train.slurm.continuation={kind: chain, links: 2, lead: 60}",
                       "train.stages.0.tokens=1e8"], "train", "take 7 times slurm.time=0:06:00, but"),
    "time of ranking": (["rank.slurm.time=0:01:00", "rank.rank.samples=65536"], "rank", "a rank job begins anew"),
}  # fmt: skip


MAY_BE_MEANT = {
    "memory of logits", "memory of activations", "tensor across nodes", "positions", "time of one job",
    "time of links", "time of ranking", "small budget", "large budget",
}  # fmt: skip


def prepared(folder: Path, overrides: list[str]) -> tuple[Path, list[str]]:
    """The chain's file and the overrides without ``parent.max``, which is written into the parent's config."""
    chain, own = write_chain(folder), [o for o in overrides if not o.startswith("parent.max=")]
    for override in set(overrides) - set(own):
        positions = int(override.partition("=")[2])
        write_model(folder / "parent", replace(SHAPE, max_position_embeddings=positions))
    return chain, own


def test_the_chain_itself_has_no_findings(tmp_path: Path) -> None:
    assert findings(write_chain(tmp_path)) == []


@pytest.mark.parametrize("name", SETTINGS)
def test_an_impossible_setting_is_one_finding_and_its_remedies_mend_it(tmp_path: Path, name: str) -> None:
    overrides, job, says = SETTINGS[name]
    chain, overrides = prepared(tmp_path, overrides)
    assert_one_finding_that_is_mended(chain, overrides, job, says, meant=name in MAY_BE_MEANT)


def test_several_findings_come_at_once_errors_first(tmp_path: Path) -> None:
    wrong = ["rank.rank.seq_length=8192", "rank.rank.samples=63", "train.parallel.sequence=false"]
    found = findings(write_chain(tmp_path), *wrong)
    assert [(f.job, f.severity) for f in found] == [
        ("rank", "error"),
        ("train", "error"),
        ("rank", "warning"),
    ]
    assert str(found[0]).startswith("rank: rank: samples=63")


TABLE = "metric: latency, target: 0.7, table: times.json"


def remove(path: Path) -> Callable[[Path], object]:
    return lambda root: (root / path).unlink()


def replaced(name: str, old: str, new: str) -> Callable[[Path], object]:
    def edit(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))

    return edit


def filled(path: str) -> Callable[[Path], object]:
    def fill(root: Path) -> None:
        (root / path).mkdir(parents=True)
        (root / path / "file").touch()

    return fill


@pytest.mark.parametrize(
    ("spoil", "job", "says", "mend"),
    [
        (remove(Path("data/train.idx")), "rank, train", "data.train.0.path: ROOT/data/train.idx is missing; write it by:",
         lambda root: write_data(root / "data/train")),
        (remove(Path("data/valid.bin")), "train", "data.valid.0.path: ROOT/data/valid.bin is missing",
         lambda root: write_data(root / "data/valid")),
        (remove(Path("parent/config.json")), "rank", "model.hf: ROOT/parent/config.json is missing",
         lambda root: write_model(root / "parent")),
        (replaced("chain.yaml", "train.yaml, after: [rank]", "train.yaml"), "train",
         "model.checkpoint: ROOT/runs/rank is written by job rank, which need not be done before; "
         "add rank to jobs.train.after",
         replaced("chain.yaml", "train.yaml", "train.yaml, after: [rank]")),
        (replaced("export.yaml", "runs/train", "runs/other"), "export", "model.checkpoint: ROOT/runs/other holds no",
         replaced("export.yaml", "runs/other", "runs/train")),
        (replaced("export.yaml", "runs/export", "data/train.bin/run"), "export",
         "run_dir: ROOT/data/train.bin cannot be written to; choose another run_dir",
         replaced("export.yaml", "data/train.bin/run", "runs/export")),
        (replaced("chain.yaml", "run_dir: runs", "run_dir: data/train.bin/runs"), "",
         "run_dir of the chain: ROOT/data/train.bin cannot be written to; choose another run_dir",
         replaced("chain.yaml", "run_dir: data/train.bin/runs", "run_dir: runs")),
        (replaced("cluster.yaml", "gpus_per_node: 4", "gpus_per_node: 4\nlog_dir: data/train.bin"), "",
         "log_dir of the chain: ROOT/data/train.bin cannot be written to",
         replaced("cluster.yaml", "log_dir: data/train.bin", "log_dir: logs")),
        (replaced("base.yaml", "data:", "data:\n  cache: data/train.bin/cache"), "rank, train",
         "data.cache: ROOT/data/train.bin cannot be written to; choose another data.cache",
         replaced("base.yaml", "data/train.bin/cache", "cache")),
        (filled("out/elastic"), "export", "export.elastic: ROOT/out/elastic holds something that this recipe did not",
         lambda root: shutil.rmtree(root / "out/elastic")),
        (filled("out/slices/small"), "export", "export.slices: ROOT/out/slices/small holds something",
         lambda root: shutil.rmtree(root / "out/slices/small")),
        (replaced("base.yaml", "{dtype: bf16}", "{dtype: bf16, tokenizer: tok}"), "rank, train, export",
         "model.tokenizer: ROOT/tok is no folder", lambda root: (root / "tok").mkdir()),
        (replaced("train.yaml", "metric: active_params, target: 0.7", TABLE), "train",
         "budgets.small.table: ROOT/times.json is missing; measure it",
         replaced("train.yaml", TABLE, "metric: active_params, target: 0.7")),
    ],
)  # fmt: skip
def test_a_missing_or_taken_path_is_one_finding(
    tmp_path: Path, spoil: Callable[[Path], object], job: str, says: str, mend: Callable[[Path], object]
) -> None:
    chain = write_chain(tmp_path)
    spoil(tmp_path)
    (found,) = findings(chain)
    assert found.job == job and says.replace("ROOT", str(tmp_path)) in found.text and "\n" not in found.text
    mend(tmp_path)
    assert findings(chain) == []


def test_a_damaged_table_is_told_apart_from_a_missing_one(tmp_path: Path) -> None:
    chain = write_chain(tmp_path)
    replaced("train.yaml", "metric: active_params, target: 0.7", TABLE)(tmp_path)
    (tmp_path / "times.json").write_text("{}")
    (found,) = findings(chain)
    assert found.severity == "error" and found.text.startswith("budgets.small: latency table")


def test_a_pass_over_data_runs_whole_pipeline_stages(tmp_path: Path) -> None:
    """``rank`` leaves the virtual pipeline out, so that it may stand in what the recipes share."""
    layout = ["parallel.pipeline=4", "parallel.virtual_pipeline=3", "slurm.nodes=4"]
    chain = write_chain(tmp_path)
    assert findings(chain, *(f"rank.{override}" for override in layout)) == []
    assert findings(chain, *(f"train.{override}" for override in layout)) != []


def test_memory_is_never_bought_with_other_submodels() -> None:
    """8 context ranks cannot share 20 heads: no remedy against too little memory."""
    space = ElasticSpace.build(SHAPE, {"mamba_num_heads": [20, 32]})
    setting = Setting.of(SHAPE, space, Parallel(world_size=8), ranks_per_node=8)
    assert problems_of(setting) == [] and legal(setting, {"parallel.context": 4}) == {"parallel.context": 4}
    assert legal(setting, {"parallel.context": 8}) is None
    tensor = {"parallel.tensor": 4, "parallel.sequence": True}
    assert legal(setting, {"parallel.tensor": 4}) == tensor, "what a change needs besides comes along"


def test_only_gpus_refuse_what_kernels_do_not_take(tmp_path: Path) -> None:
    """A cluster file with GPUs is what says that a chain will meet kernels."""
    chain = write_chain(tmp_path)
    write_model(tmp_path / "parent", replace(SHAPE, conv_kernel=5))
    found = findings(chain)
    assert [f.severity for f in found] == ["error"] and "conv_kernel=5" in found[0].text
    ranks = ("rank.slurm.ranks_per_node=4", "train.slurm.ranks_per_node=4")
    assert findings(chain, "cluster.gpus_per_node=0", "cluster.gpu=null", *ranks) == []
