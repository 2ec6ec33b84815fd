"""A small chain on disk that preflight has nothing to say about, and the findings of changed ones."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import dedent

from elastic_megatron.preflight import Finding, preflight
from elastic_megatron.recipe import load_jobs
from elastic_megatron.space import ParentShape

SHAPE = ParentShape(
    "MEM*ME-E", hidden_size=256, vocab_size=4096, ffn_hidden_size=512, num_moe_experts=16, moe_router_topk=2,
    moe_ffn_hidden_size=128, moe_shared_expert_intermediate_size=256, mamba_num_heads=32, mamba_head_dim=32,
    mamba_state_dim=32, mamba_num_groups=4, num_attention_heads=16, num_query_groups=4, kv_channels=32,
    max_position_embeddings=4096,
)  # fmt: skip
CLUSTER = """
    gpus_per_node: 4
    gpu: {name: toy, memory_gib: 3, bf16_tflops: 1}
    utilization: 0.3
    max_nodes: 8
    time: "4:00:00"
    max_time: "8:00:00"
"""
BASE = """
    name: toy
    model: {dtype: bf16}
    data:
      train: [{path: data/train, weight: 1}]
      valid: [{path: data/valid, weight: 1}]
    space:
      choices:
        hidden_size: [128, 256]
        num_moe_experts: [8, 16]
        mamba_num_heads: [16, 32]
        num_attention_heads: [8, 16]
        moe_ffn_hidden_size: [64, 128]
      lanes: {num_moe_experts: 4, moe_ffn_hidden_size: 2}
"""
RANK = """
    extends: base.yaml
    job: rank
    run_dir: runs/rank
    model: {hf: parent}
    rank: {samples: 64, seq_length: 256}
    parallel: {expert: 4}
    slurm: {nodes: 1}
"""
TRAIN = """
    extends: base.yaml
    run_dir: runs/train
    model: {checkpoint: runs/rank}
    budgets:
      large: {metric: active_params, target: 1.0}
      small: {metric: active_params, target: 0.7}
    stages:
      - {name: short, tokens: 1e6, seq_length: 1024, global_batch_size: 32, micro_batch_size: 2}
      - {name: long, tokens: 1e6, seq_length: 4096, global_batch_size: 16, micro_batch_size: 1}
    parallel: {tensor: 2, sequence: true, expert: 4, expert_tensor: 1, context: 2}
    slurm: {nodes: 2, continuation: {kind: requeue, lead: 300}}
"""
PTQ = """
    extends: base.yaml
    job: quantize
    run_dir: runs/ptq
    model: {checkpoint: runs/train}
    quantize: {format: nvfp4, samples: 64, seq_length: 256}
    parallel: {tensor: 2, sequence: true, expert: 4, expert_tensor: 1}
    slurm: {nodes: 1}
"""
QAD = """
    extends: train.yaml
    run_dir: runs/qad
    model: {checkpoint: runs/train}
    quantize: {format: nvfp4, samples: 64, seq_length: 256}
    stages:
      - {name: qad, tokens: 1e5, seq_length: 1024, global_batch_size: 32, micro_batch_size: 2}
"""
EXPORT = """
    extends: base.yaml
    job: export
    run_dir: runs/export
    model: {checkpoint: runs/train}
    export: {elastic: out/elastic, slices: out/slices, submodels: [small]}
"""
CHAIN = """
    name: toy
    cluster: cluster.yaml
    run_dir: runs
    jobs:
      rank: {recipe: rank.yaml}
      train: {recipe: train.yaml, after: [rank]}
      export: {recipe: export.yaml, after: [train]}
"""
QUANTISED_CHAIN = """
    name: toy
    cluster: cluster.yaml
    run_dir: runs
    jobs:
      rank: {recipe: rank.yaml}
      train: {recipe: train.yaml, after: [rank]}
      ptq: {recipe: ptq.yaml, after: [train]}
      qad: {recipe: qad.yaml, after: [train]}
      export: {recipe: export.yaml, after: [qad]}
"""
FILES = {
    "cluster.yaml": CLUSTER, "base.yaml": BASE, "rank.yaml": RANK, "train.yaml": TRAIN, "export.yaml": EXPORT,
    "chain.yaml": CHAIN, "ptq.yaml": PTQ, "qad.yaml": QAD,
}  # fmt: skip


def write_model(folder: Path, shape: ParentShape = SHAPE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "nemotron_h", **shape.to_hf()}))
    return folder


def write_data(prefix: Path) -> None:
    prefix.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".bin", ".idx"):
        prefix.with_name(prefix.name + suffix).touch()


def write_chain(folder: Path, **texts: str) -> Path:
    """The chain's file; ``texts``: other contents of its files, by name without ``.yaml``."""
    for name, text in FILES.items():
        text = texts.get(name.removesuffix(".yaml"), text)
        (folder / name).write_text(dedent(text))
    write_model(folder / "parent")
    for name in ("train", "valid"):
        write_data(folder / "data" / name)
    return folder / "chain.yaml"


def write_quantised_chain(folder: Path, **texts: str) -> Path:
    """The same with a family that is quantised in two ways, and exported as the second leaves it."""
    own = {"chain": QUANTISED_CHAIN, "export": EXPORT.replace("runs/train", "runs/qad")}
    return write_chain(folder, **{**own, **texts})


def findings(chain: Path, *overrides: str) -> list[Finding]:
    return preflight(load_jobs(chain, overrides))


def remedies(finding: Finding) -> list[list[str]]:
    """Ways out that a finding names, each as overrides of the chain.

    A text ends in ``; set KEY=VALUE and KEY=VALUE, or set KEY=VALUE``, keys being the job's own.
    """
    _, _, tail = finding.text.rpartition("; ")
    ways = [re.sub(r" and rank again$", "", way) for way in tail.split(", or ") if way.startswith("set ")]
    jobs = [f"{name}." for name in finding.job.split(", ")] if finding.job else [""]
    return [[f"{job}{pair}" for pair in way[4:].split(" and ") for job in jobs] for way in ways]


def assert_one_finding_that_is_mended(
    chain: Path, overrides: Sequence[str], job: str, says: str, *, meant: bool
) -> None:
    """An impossible setting is one line about one job, and each way out that it names leaves nothing to find.

    ``meant``: may it be what somebody wants? Then it is a warning.
    """
    (found,) = findings(chain, *overrides)
    assert found.job == job and says in found.text and "\n" not in found.text
    assert (found.severity == "warning") == meant
    ways = remedies(found)
    assert ways, found.text
    for way in ways:
        assert findings(chain, *overrides, *way) == [], way
