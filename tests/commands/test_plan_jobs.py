"""``plan`` of a chain: what every job takes."""

import math
from pathlib import Path

import pytest
from plan_calls import parse, planned, shape_of

from elastic_megatron.cost import account
from elastic_megatron.errors import UserError

CLUSTER = """\
gpus_per_node: 4
gpu: {name: toy, memory_gib: 10, bf16_tflops: 0.5}
utilization: 0.5
time: "0:10:00"
"""
TRAIN = """\
extends: small.yaml
run_dir: train
stages:
  - {name: short, tokens: 65536, seq_length: 64, global_batch_size: 16}
  - {name: long, tokens: 65536, seq_length: 128, global_batch_size: 8}
parallel: {tensor: 2, sequence: true, expert: 2, expert_tensor: 1}
slurm: {nodes: 2, ranks_per_node: 4}
"""
CHAIN = """\
name: story
cluster: cluster.yaml
run_dir: .
jobs:
  rank: {recipe: rank.yaml}
  stage1: {recipe: stage1.yaml, after: [rank]}
  stage2: {recipe: stage2.yaml, after: [stage1]}
  export: {recipe: export.yaml, after: [stage2]}
"""


@pytest.fixture
def chain(small: Path) -> Path:
    """rank, two stages of one run, and an export of it."""
    folder = small.parent
    follows = "model: {sizes: null, checkpoint: rank, dtype: bf16}\n"
    export = "export: {elastic: out, slices: parts, submodels: [full]}\n"
    files = {
        "cluster": CLUSTER,
        "rank": "extends: small.yaml\njob: rank\nrun_dir: rank\nrank: {samples: 64, seq_length: 32}\n",
        "stage1": TRAIN.replace("small.yaml", "stage2.yaml") + "stop_after: short\n",
        "stage2": TRAIN + follows,
        "export": f"extends: small.yaml\njob: export\nrun_dir: export\n{follows.replace(': rank', ': train')}{export}",
        "chain": CHAIN,
    }
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "chain.yaml"


def test_jobs_of_a_chain_are_counted(chain: Path, small: Path) -> None:
    result = planned(chain)
    jobs, shape = result["jobs"], shape_of(small)
    assert list(jobs) == ["rank", "stage1", "stage2", "export"]
    assert result["parent"] == planned(small)["parent"] and set(result["submodels"]) == {"full", "smallest"}
    assert [job["ranks"] for job in jobs.values()] == [4, 8, 8, 1]
    assert [job["steps"] for job in jobs.values()] == [0, 64, 64, 0]
    assert [job["tokens"] for job in jobs.values()] == [64 * 32, 65536, 65536, 0]
    one = {n: account(shape, context_length=n).flops_per_token for n in (32, 64, 128)}
    assert jobs["rank"]["flops"] == one[32] * (64 * 32 + 2 * 32), "one pass, and two of a micro-batch"
    assert jobs["stage1"]["flops"] == 4 * one[64] * 65536, "3 of the student, 1 of the teacher"
    assert jobs["stage2"]["flops"] == 4 * one[128] * 65536
    for job in jobs.values():
        assert job["gpu_hours"] == pytest.approx([job["flops"] / (0.5e12 * 0.5) / 3600] * 2)
        assert job["hours"] == pytest.approx([hours / job["ranks"] for hours in job["gpu_hours"]])
    weights = account(shape).total_params
    assert [job["checkpoint_bytes"] for job in jobs.values()] == [n * weights for n in (2, 14, 14, 4)]
    assert [job["disk_bytes"] for job in jobs.values()] == [n * weights for n in (2, 42, 42, 4)]
    assert jobs["stage2"]["memory_limit"] == 10 * 2**30 and jobs["export"]["memory_per_rank"] is None
    assert result["layout"]["ok"] and result["layout"]["expert"] == {
        "expert_tensor": 1, "expert": 2, "pipeline": 1, "data": 4,
    }  # fmt: skip
    assert result["memory_per_rank"] == jobs["stage2"]["memory_per_rank"]


def test_recomputation_and_slow_gpus_take_longer(chain: Path) -> None:
    plain = planned(chain)["jobs"]["stage1"]
    slow = planned(chain, "stage1.parallel.recompute=full", "cluster.utilization=1e-6")["jobs"]["stage1"]
    assert slow["flops"] == plain["flops"] * 5 / 4
    assert slow["gpu_hours"] == pytest.approx([hours * 5 / 4 * 0.5e6 for hours in plain["gpu_hours"]])
    useful = 600 - 300  # seconds of a job before it is told to save
    assert plain["slurm_jobs"] == 1 and slow["slurm_jobs"] == math.ceil(slow["hours"][1] * 3600 / useful)


def test_a_step_that_was_measured_says_how_long_all_of_them_take(chain: Path) -> None:
    """Whatever the peak is said to be: a job of n such steps on as many GPUs takes n times as long."""
    flops = planned(chain)["jobs"]["stage1"]["flops"] / 64
    step = f"cluster.measured_step={{flops: {flops}, gpus: 8, seconds: 5}}"
    for peak in (0.5, 100):
        card = f"cluster.gpu={{name: toy, memory_gib: 10, bf16_tflops: {peak}}}"
        job = planned(chain, step, card, "cluster.utilization=null")["jobs"]["stage1"]
        assert job["steps"] == 64 and job["hours"] == pytest.approx([64 * 5 / 3600] * 2)
    for wrong in ("cluster.utilization=0.5", "cluster.gpu=null", "cluster.gpu.bf16_tflops=1e-9"):
        with pytest.raises(UserError, match="measured_step"):
            planned(chain, step, "cluster.utilization=null", wrong)


def test_hours_are_a_range_where_nobody_measured(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse(chain, "cluster.utilization=null")
    fewest, most = planned(chain, "cluster.utilization=null")["jobs"]["stage1"]["gpu_hours"]
    assert fewest / most == pytest.approx(0.08 / 0.155)
    args.handler(args)
    assert "as published" in " ".join(capsys.readouterr().out.split())


def test_without_a_gpu_there_are_no_hours(chain: Path) -> None:
    jobs = planned(chain, "cluster.gpu=null")["jobs"]
    for job in jobs.values():
        assert job["gpu_hours"] is job["hours"] is job["slurm_jobs"] is job["memory_limit"] is None
    assert jobs["stage1"]["flops"] > 0 and jobs["stage1"]["memory_per_rank"]["logits"] > 0


def test_a_recipe_is_a_chain_of_one_job(chain: Path, small: Path) -> None:
    alone = planned(chain.parent / "rank.yaml", f"slurm.cluster={chain.parent}/cluster.yaml")
    assert alone["jobs"] == {"rank": planned(chain)["jobs"]["rank"]}
    unknown = planned(small)["jobs"]["train"]
    assert unknown["ranks"] is None and unknown["steps"] == 0 and unknown["hours"] is None


def test_problems_of_every_job_are_told(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["rank.rank.samples=63", "stage2.stages.1.seq_length=127", "stage2.parallel.context=2"]
    jobs = planned(chain, *overrides)["jobs"]
    assert [len(job["problems"]) for job in jobs.values()] == [1, 0, 1, 0]
    args = parse(chain, *overrides)
    args.handler(args)
    shown = " ".join(capsys.readouterr().out.split())
    assert "- rank: rank: samples=63" in shown and "set rank.samples=64" in shown
    assert "- stage2: stage long: seq_length=127" in shown


def test_people_read_the_jobs_of_a_chain(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse(chain)
    args.handler(args)
    shown = capsys.readouterr().out
    assert "…" not in shown
    for text in ("stage1", "65.5 k", "GPU-h", "of toy", "50 % of 0.5 TFLOP/s", "disk"):
        assert text in " ".join(shown.split())
