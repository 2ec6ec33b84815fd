"""Every field of a recipe, a cluster file and a chain has a reader: changing it changes a job script or a built run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import job_probes as job
import numpy as np
import pytest
import run_probes as run
import torch
from leaf_fields import leaf_fields
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from elastic_megatron.recipe import Chain, Cluster, Recipe, load, load_jobs

RECIPE = """\
name: base
run_dir: run
model:
  dtype: fp32
  sizes:
    hybrid_layer_pattern: ME*-
    hidden_size: 16
    vocab_size: 64
    max_position_embeddings: 64
    ffn_hidden_size: 16
    moe_ffn_hidden_size: 8
    moe_shared_expert_intermediate_size: 8
    num_moe_experts: 8
    moe_router_topk: 2
    mamba_num_heads: 8
    mamba_head_dim: 4
    mamba_state_dim: 4
    mamba_num_groups: 4
    num_attention_heads: 8
    num_query_groups: 4
    kv_channels: 4
data:
  train: [{path: data/one, weight: 1}, {path: data/two, weight: 1}]
  valid: [{path: data/one, weight: 1}, {path: data/two, weight: 1}]
space:
  choices: {hidden_size: [8, 12, 16], num_moe_experts: [4, 6, 8], mamba_num_heads: [4, 8]}
budgets:
  full: {metric: active_params, target: 1.0}
  small: {metric: active_params, target: 0.7}
  mem: {metric: memory_bytes, target: 0.6, sequence_length: 64}
  fast: {metric: latency, target: 0.5, table: table.json}
router: {inner_size: 4}
optimizer: {lr: 1e-3, warmup_steps: 2}
stages:
  - {name: one, tokens: 192, seq_length: 8, global_batch_size: 8, micro_batch_size: 2}
  - {name: two, tokens: 96, seq_length: 8, global_batch_size: 4, micro_batch_size: 2}
log: {eval_tokens: 16}
"""
# One Mamba layer learns from plain text: a whole run takes a moment.
SHORT = """\
name: short
run_dir: run
model:
  dtype: fp32
  sizes: {hybrid_layer_pattern: M, hidden_size: 8, vocab_size: 64, mamba_num_heads: 2, mamba_head_dim: 4,
    mamba_state_dim: 4, mamba_num_groups: 1}
data: {train: [{path: data/one, weight: 1}], valid: [{path: data/two, weight: 1}]}
loss: {kind: cross_entropy}
stages:
  - {name: one, tokens: 48, seq_length: 8, global_batch_size: 2, micro_batch_size: 2}
  - {name: two, tokens: 16, seq_length: 8, global_batch_size: 2, micro_batch_size: 2}
log: {eval_tokens: 16, tensorboard: false, interval: 2}
"""
EXPORT = """\
name: export
job: export
run_dir: export
model: {checkpoint: run}
export: {elastic: whole, slices: slices, submodels: [a, b], dtype: fp32}
"""
CHAIN = """\
name: chain
run_dir: runs
cluster: cluster.yaml
jobs:
  first: {recipe: recipe.yaml}
  second: {recipe: recipe.yaml, after: [first]}
"""
CLUSTER = """\
account: team
partition: batch
qos: normal
gpus_per_node: 2
gpu: h200
max_time: "8:00:00"
container: {runtime: pyxis, image: image, mounts: [.]}
environment: [TEAM]
sbatch: {comment: chain}
"""
FILES = {"recipe": RECIPE, "short": SHORT, "export": EXPORT, "chain": CHAIN, "cluster": CLUSTER}


@dataclass(frozen=True)
class Case:
    """`probe` sees a difference after the override `change`, in `file` under the overrides `given`.

    The difference is a complaint where a value is `refused`.
    """

    probe: Callable[[Any], object]
    change: str
    given: tuple[str, ...] = ()
    file: str = "recipe"
    refused: bool = False


def sizes(probe: Callable[[Any], object], **values: object) -> dict[str, Case]:
    return {
        f"model.sizes.{name}": Case(probe, f"model.sizes.{name}={value}") for name, value in values.items()
    }


# batches for eight ranks, and no draws for them to share
EIGHT = (
    "budgets=", "loss.kind=cross_entropy", "stages.0.global_batch_size=64", "stages.0.micro_batch_size=1",
    "stages.1.global_batch_size=64", "stages.1.micro_batch_size=1",
)  # fmt: skip
SPLIT = ("parallel={tensor: 2, sequence: true}", *EIGHT)
LAYOUT: dict[str, Case] = {
    "seed": Case(run.micro_batches, "seed=7"),
    "parallel.tensor": Case(run.layout, "parallel.tensor=4", SPLIT),
    "parallel.sequence": Case(run.layout, "parallel.sequence=true", (*EIGHT, "model.sizes.hybrid_layer_pattern='M*-'", "space=", "parallel.tensor=2")),
    "parallel.expert": Case(run.layout, "parallel.expert=4", EIGHT),
    "parallel.expert_tensor": Case(run.layout, "parallel.expert_tensor=1", SPLIT),
    "parallel.pipeline": Case(run.layout, "parallel.pipeline=2", EIGHT),
    "parallel.virtual_pipeline": Case(run.layout, "parallel.virtual_pipeline=2", (*EIGHT, "parallel.pipeline=2")),
    "parallel.context": Case(run.layout, "parallel.context=2", EIGHT),
    "parallel.world_size": Case(run.layout, "parallel.world_size=2", EIGHT, refused=True),
    "parallel.distributed_timeout_minutes": Case(run.layout, "parallel.distributed_timeout_minutes=45", EIGHT),
    "parallel.distributed_optimizer": Case(run.communication, "parallel.distributed_optimizer=false"),
    "parallel.overlap": Case(run.communication, "parallel.overlap=true"),
    "parallel.dispatcher": Case(run.model_config, "parallel.dispatcher=allgather"),
    "parallel.fused_experts": Case(run.model_config_with_kernels, "parallel.fused_experts=false"),
    "parallel.shared_expert_overlap": Case(run.model_config, "parallel.shared_expert_overlap=true"),
    "parallel.recompute": Case(run.model_config, "parallel.recompute=full"),
}  # fmt: skip
MODEL: dict[str, Case] = {
    **sizes(run.model_config, hybrid_layer_pattern="ME*", hidden_size=32, vocab_size=128, ffn_hidden_size=32,
            moe_ffn_hidden_size=16, moe_shared_expert_intermediate_size=16, num_moe_experts=16, moe_router_topk=3,
            moe_router_topk_scaling_factor=2.5, mamba_num_heads=16, mamba_head_dim=8, mamba_state_dim=8,
            mamba_num_groups=2, num_attention_heads=16, num_query_groups=2, kv_channels=8, max_position_embeddings=128,
            layernorm_epsilon=1e-4, tie_embeddings="true"),
    **sizes(run.mixer, conv_kernel=3, mamba_chunk_size=64),
    "model.hf": Case(run.opened, "model={hf: other}", ("model={hf: parent}",)),
    "model.checkpoint": Case(run.opened, "model={checkpoint: other}", ("model={checkpoint: parent}",)),
    "model.dtype": Case(run.model_config, "model.dtype=bf16"),
    "model.tokenizer": Case(run.opened, "model.tokenizer=words", ("model={hf: parent}",)),
    "teacher.checkpoint": Case(run.opened, "teacher.checkpoint=teacher", ("model={hf: parent}",)),
    "teacher.cache": Case(run.kept, "teacher.cache=kept"),
    "teacher.top_k": Case(run.kept, "teacher.top_k=7", ("teacher.cache=kept",)),
    "teacher.cache_only": Case(run.kept, "teacher.cache_only=true", ("teacher.cache=kept",)),
    "loss.moe_aux_loss": Case(run.model_config, "loss.moe_aux_loss=0.1"),
    "loss.moe_bias_update_rate": Case(run.model_config, "loss.moe_bias_update_rate=0.1"),
}  # fmt: skip
DATA: dict[str, Case] = {
    "data.train[].path": Case(run.data_sets, "data.train.0.path=three"),
    "data.train[].weight": Case(run.data_sets, "data.train.0.weight=3"),
    "data.valid[].path": Case(run.data_sets, "data.valid.0.path=three"),
    "data.valid[].weight": Case(run.data_sets, "data.valid.0.weight=3"),
    "data.cache": Case(run.data_sets, "data.cache=cache"),
    "log.eval_tokens": Case(run.data_sets, "log.eval_tokens=32"),
    "stages[].name": Case(run.stage_names, "stages.1.name=last"),
    "stages[].tokens": Case(run.data_sets, "stages.0.tokens=1000"),
    "stages[].seq_length": Case(run.micro_batches, "stages.0.seq_length=16"),
    "stages[].global_batch_size": Case(run.micro_batches, "stages.0.global_batch_size=4"),
    "stages[].micro_batch_size": Case(run.micro_batches, "stages.0.micro_batch_size=4"),
    "stages[].samples_per_draw": Case(run.micro_batches, "stages.0.samples_per_draw=8"),
    "stages[].budget_probs<word>": Case(run.micro_batches, "stages.0.budget_probs=uniform", ("stages.0.budget_probs={full: 1}",)),
    "stages[].budget_probs<table>": Case(run.micro_batches, "stages.0.budget_probs={small: 1}"),
    "stages[].budgets_per_batch": Case(run.micro_batches, "stages.0.budgets_per_batch=2"),
    "stages[].execution": Case(run.micro_batches, "stages.0.execution=masked"),
    "stages[].lr": Case(run.learning_rates, "stages.1.lr=1e-4"),
}  # fmt: skip
ROUTER: dict[str, Case] = {
    "space.choices": Case(run.space_of, "space.choices.hidden_size=[8, 16]"),
    "space.lanes": Case(run.space_of, "space.lanes.num_moe_experts=2"),
    "space.granule": Case(run.space_of, "space.granule.hidden_size=8", refused=True),
    "space.per_layer": Case(run.space_of, "space.per_layer=[mamba_num_heads]"),
    "budgets{}<ParameterBudget>.metric": Case(run.budget_errors, "budgets.small.metric=total_params"),
    "budgets{}<ParameterBudget>.target": Case(run.budget_errors, "budgets.small.target=0.6"),
    "budgets{}<ParameterBudget>.unit": Case(run.budget_errors, "budgets.small.unit=absolute"),
    "budgets{}<MemoryBudget>.metric": Case(run.budget_errors, "budgets.mem.metric=total_params"),
    "budgets{}<MemoryBudget>.target": Case(run.budget_errors, "budgets.mem.target=0.5"),
    "budgets{}<MemoryBudget>.unit": Case(run.budget_errors, "budgets.mem.unit=absolute"),
    "budgets{}<MemoryBudget>.format": Case(run.budget_errors, "budgets.mem.format=nvfp4"),
    "budgets{}<MemoryBudget>.sequence_length": Case(run.budget_errors, "budgets.mem.sequence_length=4096"),
    "budgets{}<MemoryBudget>.batch_size": Case(run.budget_errors, "budgets.mem.batch_size=9"),
    "budgets{}<LatencyBudget>.metric": Case(run.budget_errors, "budgets.fast.metric=total_params"),
    "budgets{}<LatencyBudget>.target": Case(run.budget_errors, "budgets.fast.target=0.6"),
    "budgets{}<LatencyBudget>.unit": Case(run.budget_errors, "budgets.fast.unit=absolute"),
    "budgets{}<LatencyBudget>.table": Case(run.budget_errors, "budgets.fast.table=slow.json"),
    "router.inner_size": Case(run.router_weights, "router.inner_size=5"),
    "router.init_std": Case(run.router_weights, "router.init_std=0.2"),
    "router.tau.start": Case(run.losses, "router.tau.start=2"),
    "router.tau.end": Case(run.losses, "router.tau.end=0.5"),
    "router.logit_scale.start": Case(run.losses, "router.logit_scale.start=2"),
    "router.logit_scale.end": Case(run.losses, "router.logit_scale.end=3"),
    "router.sampling": Case(run.losses, "router.sampling=hard"),
    "router.loss_weight": Case(run.losses, "router.loss_weight=2"),
    "router.dead_zone": Case(run.losses, "router.dead_zone=0.5"),
    "router.identity_weight": Case(run.losses, "router.identity_weight=1", ("router.pin_full=false",)),
    "router.pin_full": Case(run.losses, "router.pin_full=false"),
    "router.frozen": Case(run.trained_router, "router.frozen=true"),
    "router.accept_missed_budgets": Case(run.missed_budgets, "router.accept_missed_budgets=true"),
    "router.lr": Case(run.optimizer, "router.lr=0.1"),
    "loss.kind": Case(run.losses, "loss.kind=reverse_kl"),
    "loss.temperature": Case(run.losses, "loss.temperature=2"),
    "loss.ce_weight": Case(run.losses, "loss.ce_weight=0.5"),
    "loss.chunk": Case(run.logit_blocks, "loss.chunk=5"),
    "loss.recompute": Case(run.logit_blocks, "loss.recompute=true"),
    "loss.divergence_patience": Case(run.divergence, "loss.divergence_patience=2"),
    "loss.on_divergence": Case(run.divergence, "loss.on_divergence=rewind"),
    "loss.max_rewinds": Case(run.divergence, "loss.max_rewinds=1", ("loss.on_divergence=rewind", "loss.divergence_patience=1")),
    "loss.spike_window": Case(run.spikes, "loss.spike_window=8"),
    "loss.spike_threshold": Case(run.spikes, "loss.spike_threshold=100"),
}  # fmt: skip
OPTIMIZER: dict[str, Case] = {
    "optimizer.lr": Case(run.learning_rates, "optimizer.lr=2e-3"),
    "optimizer.min_lr": Case(run.learning_rates, "optimizer.min_lr=1e-4"),
    "optimizer.betas": Case(run.optimizer, "optimizer.betas=[0.8, 0.9]"),
    "optimizer.eps": Case(run.optimizer, "optimizer.eps=1e-4"),
    "optimizer.weight_decay": Case(run.learning_rates, "optimizer.weight_decay=0.1"),
    "optimizer.clip_grad": Case(run.optimizer, "optimizer.clip_grad=0.5"),
    "optimizer.schedule": Case(run.learning_rates, "optimizer.schedule=linear"),
    "optimizer.warmup_steps": Case(run.learning_rates, "optimizer.warmup_steps=3"),
    "optimizer.warmup_tokens": Case(run.learning_rates, "optimizer.warmup_tokens=192", ("optimizer.warmup_steps=",)),
    "optimizer.wsd_decay_fraction": Case(run.learning_rates, "optimizer.wsd_decay_fraction=0.5", ("optimizer.schedule=wsd",)),
}  # fmt: skip
RUN: dict[str, Case] = {
    "name": Case(run.run, "name=other", file="short"),
    "run_dir": Case(run.run, "run_dir=elsewhere", file="short"),
    "stop_after": Case(run.run, "stop_after=one", file="short"),
    "checkpoint.interval": Case(run.run, "checkpoint.interval=3", file="short"),
    "checkpoint.interval_tokens": Case(run.run, "checkpoint.interval_tokens=48", file="short"),
    "checkpoint.keep_last": Case(run.run, "checkpoint.keep_last=3", ("checkpoint.interval=1",), file="short"),
    "checkpoint.async_save": Case(run.run, "checkpoint.async_save=true", file="short"),
    "log.interval": Case(run.run, "log.interval=3", file="short"),
    "log.eval_interval": Case(run.run, "log.eval_interval=3", file="short"),
    "log.tensorboard": Case(run.run, "log.tensorboard=true", file="short"),
}
RANK: dict[str, Case] = {
    "rank.samples": Case(run.ranking, "rank.samples=12", ("rank={samples: 8, seq_length: 8}",)),
    "rank.seq_length": Case(run.ranking, "rank.seq_length=16", ("rank={samples: 8, seq_length: 8}",)),
    "rank.micro_batch_size": Case(run.ranking, "rank.micro_batch_size=4", ("rank={samples: 8, seq_length: 8}",)),
    "rank.depth": Case(run.ranking, "rank.depth=false", ("rank={samples: 8, seq_length: 8, depth: true}", "space.choices.num_layers=[3, 4]"), refused=True),
}  # fmt: skip
EXPORTS: dict[str, Case] = {
    "export.elastic": Case(run.exports, "export.elastic=other", file="export"),
    "export.slices": Case(run.exports, "export.slices=other", file="export"),
    "export.submodels": Case(run.exports, "export.submodels=[a]", file="export"),
    "export.dtype": Case(run.exports, "export.dtype=bf16", file="export"),
    "export.plain_order": Case(run.exports, "export.plain_order=true", file="export"),
    "export.verify": Case(run.exports, "export.verify=false", file="export"),
    "export.allow_nonfinite": Case(run.exports, "export.allow_nonfinite=true", file="export"),
}
# attention behind a Mamba layer, and no submodels: those come with a checkpoint
QUANTISED = (
    "model.sizes.hybrid_layer_pattern='ME-M*'", "budgets=", "loss.kind=cross_entropy",
    "quantize={format: fp8, samples: 8, seq_length: 8, micro_batch_size: 2}",
)  # fmt: skip
QUANTIZE: dict[str, Case] = {
    "quantize.format": Case(run.quantising, "quantize.format=nvfp4", QUANTISED),
    "quantize.preset": Case(run.quantising, "quantize.preset=mamba_moe_conservative", QUANTISED),
    "quantize.keep_feeding_mamba": Case(run.quantising, "quantize.keep_feeding_mamba=false", QUANTISED),
    "quantize.keep": Case(run.quantising, "quantize.keep=['backbone.layers.0.*']", QUANTISED),
    "quantize.samples": Case(run.quantising, "quantize.samples=12", QUANTISED),
    "quantize.seq_length": Case(run.quantising, "quantize.seq_length=16", QUANTISED),
    "quantize.micro_batch_size": Case(run.quantising, "quantize.micro_batch_size=4", QUANTISED),
}
JOBS: dict[str, Case] = {
    "job": Case(job.scripts, "second.job=rank", file="chain"),
    "slurm.cluster": Case(job.scripts, "slurm.cluster=other.yaml", ("slurm.cluster=cluster.yaml",)),
    "slurm.nodes": Case(job.scripts, "second.slurm.nodes=3", file="chain"),
    "slurm.ranks_per_node": Case(job.scripts, "second.slurm.ranks_per_node=1", file="chain"),
    "slurm.time": Case(job.scripts, "second.slurm.time=9:00:00", file="chain"),
    "slurm.sbatch": Case(job.scripts, "second.slurm.sbatch={nice: 3}", file="chain"),
}  # fmt: skip
for variant, base in (
    ("Requeue", "{kind: requeue}"),
    ("Links", "{kind: chain, links: 2}"),
    ("Once", "{kind: none}"),
):
    given, at = (f"second.slurm.continuation={base}",), f"slurm.continuation<{variant}>"
    other = "{kind: none}" if variant != "Once" else "{kind: requeue}"
    JOBS[f"{at}.kind"] = Case(job.scripts, f"second.slurm.continuation={other}", given, "chain")
    if variant != "Once":
        JOBS[f"{at}.lead"] = Case(job.scripts, "second.slurm.continuation.lead=99", given, "chain")
        JOBS[f"{at}.max_failures"] = Case(
            job.scripts, "second.slurm.continuation.max_failures=9", given, "chain"
        )
    if variant == "Links":
        JOBS[f"{at}.links"] = Case(job.scripts, "second.slurm.continuation.links=3", given, "chain")

CONTAINERS = {
    "Pyxis": "{runtime: pyxis, image: image, mounts: [.]}",
    "Apptainer": "{runtime: apptainer, image: image, mounts: [.]}",
    "Docker": "{runtime: docker, image: image, mounts: [.]}",
    "NoContainer": "{runtime: none}",
}
EXPORTING = ("jobs.first.recipe=export.yaml",)
CARD = ("cluster.gpu={name: own, memory_gib: 0.01, bf16_tflops: 100}",)
MEASURED = "cluster.measured_step={flops: 1e12, gpus: 1, seconds: 1}"
CLUSTERS: dict[str, Case] = {
    "account": Case(job.scripts, "cluster.account=other", file="chain"),
    "partition": Case(job.scripts, "cluster.partition=other", file="chain"),
    "qos": Case(job.scripts, "cluster.qos=other", file="chain"),
    "time": Case(job.scripts, "cluster.time=9:00:00", file="chain"),
    "max_time": Case(job.findings, "cluster.max_time=1:00:00", file="chain"),
    "max_nodes": Case(job.findings, "cluster.max_nodes=1", ("second.slurm.nodes=2",), "chain"),
    "gpus_per_node": Case(job.scripts, "cluster.gpus_per_node=1", file="chain"),
    "request_gpus": Case(job.scripts, "cluster.request_gpus=false", file="chain"),
    "gpu<word>": Case(job.plans, "cluster.gpu=b200", file="chain"),
    # the card is named where its memory does not do
    "gpu<OtherGpu>.name": Case(
        job.findings,
        "cluster.gpu.name=other",
        (*CARD, "jobs={only: {recipe: short.yaml}}", "only.slurm.ranks_per_node=1"),
        "chain",
    ),
    "gpu<OtherGpu>.memory_gib": Case(job.plans, "cluster.gpu.memory_gib=2", CARD, "chain"),
    "gpu<OtherGpu>.bf16_tflops": Case(job.plans, "cluster.gpu.bf16_tflops=200", CARD, "chain"),
    "utilization": Case(job.plans, "cluster.utilization=0.5", file="chain"),
    "measured_step.flops": Case(job.plans, "cluster.measured_step.flops=2e12", (MEASURED,), file="chain"),
    "measured_step.gpus": Case(job.plans, "cluster.measured_step.gpus=2", (MEASURED,), file="chain"),
    "measured_step.seconds": Case(job.plans, "cluster.measured_step.seconds=2", (MEASURED,), file="chain"),
    "environment": Case(job.scripts, "cluster.environment=[TEAM, OTHER]", file="chain"),
    "setup": Case(job.scripts, "cluster.setup=[module load cuda]", file="chain"),
    "launcher": Case(job.scripts, "cluster.launcher=torchrun", file="chain"),
    "log_dir": Case(job.written, "cluster.log_dir=logs", file="chain"),
    "template": Case(job.scripts, "cluster.template=other.sbatch", file="chain"),
    "sbatch": Case(job.scripts, "cluster.sbatch.comment=other", file="chain"),
    "export.account": Case(job.scripts, "cluster.export.account=other", EXPORTING, "chain"),
    "export.partition": Case(job.scripts, "cluster.export.partition=cpu", EXPORTING, "chain"),
    "export.qos": Case(job.scripts, "cluster.export.qos=long", EXPORTING, "chain"),
    "export.sbatch": Case(job.scripts, "cluster.export.sbatch.mem=64G", EXPORTING, "chain"),
}
for variant, base in CONTAINERS.items():
    given, at = (f"cluster.container={base}",), f"container<{variant}>"
    other = CONTAINERS["Docker" if variant == "NoContainer" else "NoContainer"]
    CLUSTERS[f"{at}.runtime"] = Case(job.scripts, f"cluster.container={other}", given, "chain")
    for key, value in {"image": "other", "mounts": "[., /]", "arguments": "[--fast]"}.items():
        if variant != "NoContainer":
            CLUSTERS[f"{at}.{key}"] = Case(job.scripts, f"cluster.container.{key}={value}", given, "chain")
CLUSTERS["container<Pyxis>.mount_home"] = Case(job.scripts, "cluster.container.mount_home=true", file="chain")
CLUSTERS["container<NoContainer>.bin"] = Case(
    job.scripts, "cluster.container.bin=bin", ("cluster.container={runtime: none}",), "chain"
)
CHAINS: dict[str, Case] = {
    "name": Case(job.scripts, "name=other", file="chain"),
    "cluster": Case(job.scripts, "cluster=other.yaml", file="chain"),
    "run_dir": Case(job.scripts, "run_dir=elsewhere", file="chain"),
    "jobs{}.recipe": Case(job.scripts, "jobs.second.recipe=export.yaml", file="chain"),
    "jobs{}.after": Case(job.scripts, "jobs.second.after=[]", file="chain"),
}
RECIPES = LAYOUT | MODEL | DATA | ROUTER | OPTIMIZER | RUN | RANK | QUANTIZE | EXPORTS | JOBS
CASES = {("recipe", leaf): case for leaf, case in RECIPES.items()}
CASES |= {("cluster", leaf): case for leaf, case in CLUSTERS.items()}
CASES |= {("chain", leaf): case for leaf, case in CHAINS.items()}


@pytest.mark.parametrize(("kind", "cases"), [(Recipe, RECIPES), (Cluster, CLUSTERS), (Chain, CHAINS)])
def test_there_is_a_case_for_every_field(kind: type, cases: dict[str, Case]) -> None:
    assert set(leaf_fields(kind)) == set(cases)


TABLE = {
    "format_version": 1, "device": "test", "tokens": 128, "unit": "seconds", "shape": {"mamba_head_dim": 4, "moe_ffn_hidden_size": 8},
    "symbols": {
        "M": {"axes": {"hidden_size": [8, 16], "mamba_num_heads": [4, 8]}, "seconds": [[0.1, 0.2], [0.3, 0.4]]},
        "*": {"axes": {"hidden_size": [8, 16]}, "seconds": [0.1, 0.2]},
        "-": {"axes": {"hidden_size": [8, 16]}, "seconds": [0.1, 0.2]},
        "E": {"axes": {"hidden_size": [8, 16], "num_moe_experts": [4, 8]}, "seconds": [[0.1, 0.2], [0.3, 0.4]]},
    },
    "ends": {"axes": {"hidden_size": [8, 16]}, "seconds": [0.5, 0.9]},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(megatron: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documents, and the files that they name."""
    folder = tmp_path_factory.mktemp("readers")
    for name, text in FILES.items():
        (folder / f"{name}.yaml").write_text(text)
    (folder / "other.yaml").write_text(CLUSTER.replace("team", "others"))
    (folder / "other.sbatch").write_text("#!/bin/bash\n@{directives}\n@{tasks}\n")
    (folder / "table.json").write_text(json.dumps(TABLE))
    (folder / "slow.json").write_text(json.dumps(TABLE).replace("0.4", "0.8"))
    (folder / "data").mkdir()
    for number, name in enumerate(("one", "two", "three")):
        builder = IndexedDatasetBuilder(f"{folder}/data/{name}.bin", dtype=np.uint16)
        builder.add_item((torch.arange(400) + number) % 60)
        builder.end_document()
        builder.finalize(f"{folder}/data/{name}.idx")
    return folder


@pytest.fixture(scope="module")
def observe(folder: Path) -> Callable[[Case, bool], object]:
    """What a probe sees, before or after the change; runs get a fresh folder each time, under the same name."""

    @cache
    def seen(probe: Callable[[Any], object], file: str, overrides: tuple[str, ...], again: int) -> object:
        here = Path.cwd()
        os.chdir(folder)
        try:
            path = folder / f"{file}.yaml"
            if probe.__module__ == job.__name__:
                return probe(load_jobs(path, overrides))
            return probe(load(path, overrides))
        finally:
            os.chdir(here)

    def observe(case: Case, changed: bool, again: int = 0) -> object:
        overrides = (*case.given, case.change) if changed else case.given
        return seen(case.probe, case.file, overrides, again)

    return observe


@pytest.mark.parametrize(("kind", "leaf"), CASES, ids=[".".join(case) for case in CASES])
def test_field_has_a_reader(observe: Callable[..., object], kind: str, leaf: str) -> None:
    case = CASES[kind, leaf]
    before, after = observe(case, changed=False), observe(case, changed=True)
    assert before != after
    assert not isinstance(before, str) and isinstance(after, str) == case.refused, (before, after)


PROBES = {case.probe: case for case in CASES.values()}


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.__name__)
def test_a_probe_sees_no_difference_where_nothing_changed(observe: Callable[..., object], probe: Any) -> None:
    case = PROBES[probe]
    assert observe(case, changed=False) == observe(case, changed=False, again=1)
