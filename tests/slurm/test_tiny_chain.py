"""`recipes/tiny_cpu/chain.yaml` trains on two nodes with two ranks each, is interrupted, and ends as it should."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from chains import PROGRAM, TRACKER, Chain, real_chain
from local_slurm import LocalSlurm, wait_until

import elastic_megatron

# fewer tokens and samples than the recipes', so that it takes minutes
STAGES = (
    "stages.0.tokens=40960",  # 20 steps
    "stages.1.tokens=10240",  # 5
    "optimizer.warmup_steps=4",
    "checkpoint.interval=8",
    "log.interval=1",
    "log.eval_tokens=2048",
)
ACCEPTED = "router.accept_missed_budgets=true"  # in so few steps they are missed
SHORT = (
    *("parent.stages.0.tokens=20480", "parent.optimizer.warmup_steps=2", "parent.log.eval_tokens=2048"),
    *("rank.rank.samples=16", "rank.rank.micro_batch_size=4"),
    *(f"{stage}.{override}" for stage in ("stage1", "stage2") for override in STAGES),
    f"stage2.{ACCEPTED}",
    *(
        "qad.quantize.samples=32",
        "qad.stages.0.tokens=8192",
        "qad.log.eval_tokens=2048",
        "qad.log.eval_interval=0",
    ),
)
JOBS = ("parent", "rank", "stage1", "stage2")
LAST = ("qad", "export", "pack")


@dataclass
class Story:
    """What there was to see while the chain ran.

    ``seen``: what `status` said when each job had started; ``interrupted``: steps in the metrics when SIGUSR1 was
    sent to stage1; ``reference``: the folder of both stages as one uninterrupted job.
    """

    chain: Chain
    seen: dict[str, dict[str, dict[str, Any]]]
    interrupted: int
    followed: str
    reference: Path


@pytest.fixture(scope="module")
def story(slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    chain = real_chain(slurm, tmp_path_factory.mktemp("tiny"))
    chain.submit(*SHORT)
    follow = subprocess.Popen(
        chain.command("logs", "stage1", "-f"), env=slurm.env, stdout=subprocess.PIPE, text=True
    )
    seen: dict[str, dict[str, dict[str, Any]]] = {}
    try:
        for name in JOBS[:3]:
            wait_until(lambda name=name: chain.attempts(name), f"{name} starts", 300)
            seen[name] = chain.states()
        metrics = chain.run_dir / "elastic" / "metrics.jsonl"
        wait_until(lambda: len(steps(metrics)) >= 3, "stage1 trains", 300)
        seen["training"] = chain.states()
        chain.send_usr1("stage1")
        interrupted = len(steps(metrics))
        reference = submit_reference(chain)
        for name in JOBS[3:]:
            wait_until(lambda name=name: chain.attempts(name), f"{name} starts", 300)
            seen[name] = chain.states()
        for each, name in ((chain, "export"), (chain, "pack"), (reference, "train")):
            assert each.wait_until_ended(name, 300)["state"] == "done", each.run("logs", name)
        followed, _ = follow.communicate(timeout=30)
        yield Story(chain, seen, interrupted, followed, reference.run_dir)
    finally:
        follow.kill()
        slurm.reset()


def submit_reference(chain: Chain) -> Chain:
    """Both stages in one job, started by torchrun: stage2.yaml in a run folder that has no checkpoint yet."""
    reference = Chain(chain.slurm, chain.file.parent / "stage2.yaml", chain.run_dir.parent / "reference")
    reference.submit(f"run_dir={reference.run_dir}", "cluster.launcher=torchrun", *STAGES, ACCEPTED)
    return reference


def steps(metrics: Path) -> list[dict[str, Any]]:
    """The step lines of a metrics file, without how long they took."""
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in line.items() if k != "step_ms"} for line in found if "step" in line]


def test_jobs_run_one_after_another(story: Story) -> None:
    for index, name in enumerate(JOBS):
        states = {job: state["state"] for job, state in story.seen[name].items()}
        expected = ["done"] * index + ["running"] + ["waiting"] * (len(JOBS) + len(LAST) - index - 1)
        assert list(states.values()) == expected, name
        if index + 1 < len(JOBS):
            assert story.seen[name][JOBS[index + 1]]["detail"] == f"for {name}"
    assert {state["state"] for state in story.chain.states().values()} == {"done"}


def test_status_shows_how_far_training_is(story: Story) -> None:
    stage1 = story.seen["training"]["stage1"]
    assert 3 <= stage1["step"] < 20 and stage1["steps"] == 20 and stage1["loss"] is not None
    after = story.chain.states()
    assert (after["stage1"]["step"], after["stage2"]["step"], after["stage2"]["steps"]) == (20, 25, 25)


def test_usr1_saves_and_the_job_resumes_at_that_step(story: Story) -> None:
    chain = story.chain
    assert chain.attempts("stage1") == ["75", "0"]
    ended, resumed = [
        line.split()[-1] for line in (chain.job("stage1") / "attempts").read_text().splitlines()[1:3]
    ]
    assert ended == resumed, "the second attempt starts from the checkpoint of the first"
    assert story.interrupted <= int(ended) < 20
    assert (chain.run_dir / "elastic" / TRACKER).read_text().strip() == "25"


def test_the_interrupted_curve_is_that_of_one_uninterrupted_job(story: Story) -> None:
    curve = steps(story.chain.run_dir / "elastic" / "metrics.jsonl")
    assert [line["step"] for line in curve] == list(range(1, 26))
    assert curve == steps(story.reference / "metrics.jsonl")


def test_logs_of_both_attempts_are_kept_and_were_followed(story: Story) -> None:
    saved = int((story.chain.job("stage1") / "attempts").read_text().splitlines()[1].split()[-1])
    first, second = (story.chain.log("stage1", attempt) for attempt in (1, 2))
    assert f"step {saved}/20" in first and f"step {saved + 1}/20" not in first
    assert f"step {saved + 1}/20" in second and f"step {saved}/20" not in second
    for step in range(1, 21):
        assert story.followed.count(f"step {step}/20 ") == 1, step


def test_the_export_loads_in_transformers(story: Story) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    sizes = []
    for folder in ("elastic_hf", "slices/large", "slices/medium", "slices/small"):
        model = AutoModelForCausalLM.from_pretrained(story.chain.run_dir / folder)
        assert torch.isfinite(model(torch.arange(16)[None]).logits).all()
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert sizes[0] == sizes[1] > sizes[2] > sizes[3]


def test_the_family_is_quantised_on_its_ranks_and_packed(story: Story) -> None:
    """Calibration, judgement and training in one job; the packed directories hold what it trained, in NVFP4."""
    run = story.chain.run_dir
    lines = [json.loads(line) for line in (run / "qad_nvfp4/metrics.jsonl").read_text().splitlines()]
    judged = [line["eval"]["weights"] for line in lines if "eval" in line]
    assert judged == ["fp32", "nvfp4", "nvfp4"] and sum("calibration" in line for line in lines) == 1
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4]
    whole, packed = run / "elastic_hf", run / "elastic_nvfp4_hf"
    quantised = json.loads((packed / "hf_quant_config.json").read_text())["quantization"]
    assert quantised["quant_algo"] == "NVFP4" and "lm_head" in quantised["exclude_modules"]
    size = {folder: sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (whole, packed)}
    assert size[packed] < size[whole] / 2
    for name in ("large", "medium", "small"):
        config = json.loads((run / "slices_nvfp4" / name / "config.json").read_text())
        assert config["quantization_config"]["quant_algo"] == "NVFP4"
        assert (
            config["hidden_size"]
            == json.loads((run / "slices" / name / "config.json").read_text())["hidden_size"]
        )


def test_the_folder_says_what_was_run(story: Story) -> None:
    record = json.loads((story.chain.run_dir / "chain.json").read_text())
    assert record["packages"]["torch"] and "submit" in record["command"]
    git = ["git", "-C", str(Path(elastic_megatron.__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, timeout=30).stdout.strip()
    assert (record["commits"]["package"] or "").removesuffix("+dirty") == head
    for name in (*JOBS, *LAST):
        recipe = story.chain.job(name) / "recipe.yaml"
        shown = story.chain.slurm.run(str(PROGRAM), "recipe", "show", str(recipe))
        assert f"run_dir: {story.chain.run_dir}" in shown
