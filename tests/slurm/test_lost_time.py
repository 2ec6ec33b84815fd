"""Time limits that pass and nodes that are lost, on a real Slurm. Slow: Slurm takes its time to notice either."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chains import Chain, fake_chain, real_chain
from local_slurm import LocalSlurm, wait_until

pytestmark = pytest.mark.slow

# scenario -> plan, continuation, lines of the cluster file. Slurm looks at time limits every half minute.
SCENARIOS = {
    "requeue": (["wait", "finish"], "{kind: requeue, lead: 60}", ""),
    "links": (["wait", "finish"], "{kind: chain, links: 2, lead: 60}", ""),
    "torchrun": (["wait", "finish"], "{kind: requeue, lead: 60}", "launcher: torchrun"),
    "none": (["wait", "finish"], "{kind: none}", ""),
}


@pytest.fixture(scope="module")
def limited(slurm: LocalSlurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Chain]]:
    """Jobs that would wait for ever, all with a limit of two minutes."""
    made: dict[str, Chain] = {}
    for name, (plan, continuation, cluster) in SCENARIOS.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = fake_chain(slurm, folder, {"first": plan}, continuation=continuation, cluster=cluster)
        made[name].submit("first.slurm.time=0:02:00")
    yield made
    slurm.reset()


@pytest.mark.parametrize("name", ["requeue", "links", "torchrun"])
def test_ranks_save_before_the_time_limit_and_the_job_goes_on(limited: dict[str, Chain], name: str) -> None:
    chain = limited[name]
    assert chain.wait_until_ended("first", timeout=240)["state"] == "done"
    assert chain.signals("first") == [f"1 {rank} USR1" for rank in range(4)]
    assert chain.attempts("first") == ["75", "0"]
    begun, saved = (
        int(line.split()[2]) for line in (chain.job("first") / "attempts").read_text().splitlines()[:2]
    )
    assert saved - begun < 110, "of 120 seconds"


def test_without_continuation_the_limit_ends_a_job(limited: dict[str, Chain]) -> None:
    chain = limited["none"]
    first = chain.wait_until_ended("first", timeout=240)
    assert chain.signals("first") == [f"1 {rank} TERM" for rank in range(4)]
    assert (first["state"], first["attempt"]) == ("unfinished", 1)
    assert first["detail"] == "out of time, and saved; `resume` continues it"


@pytest.mark.parametrize("lost", [0, 1], ids=["the node of the batch script", "another node"])
def test_a_job_survives_the_loss_of_a_node(slurm: LocalSlurm, tmp_path: Path, lost: int) -> None:
    """Its ranks hang, as those that wait for a peer may: it is Slurm that notices."""
    chain = fake_chain(slurm, tmp_path, {"first": ["wait", "finish"]})
    try:
        chain.submit()
        chain.wait_until_waiting("first")
        slurm.kill_node(slurm.nodes[lost])
        assert chain.wait_until_ended("first", timeout=120)["state"] == "done"
        assert chain.attempts("first")[-1] == "0" and len(chain.attempts("first")) == 2
        assert slurm.nodes[lost] not in slurm.job(chain.ids("first")[0])["NodeList"]
    finally:
        slurm.reset()


def test_training_goes_on_after_the_loss_of_a_node(slurm: LocalSlurm, tmp_path: Path) -> None:
    """Two ranks of four vanish between checkpoints; the curve is that of a run without loss."""
    chain = real_chain(slurm, tmp_path)
    recipe = chain.file.parent / "parent.yaml"
    short = [
        "stages.0.tokens=61440",
        "optimizer.warmup_steps=2",
        "checkpoint.interval=10",
        "log.eval_tokens=2048",
    ]
    ranks = ["slurm.ranks_per_node=2", "stages.0.micro_batch_size=2", *short]
    whole, broken = (Chain(slurm, recipe, tmp_path / name) for name in ("whole", "broken"))
    try:
        broken.submit(f"run_dir={broken.run_dir}", *ranks)
        wait_until(lambda: len(curve(broken)) >= 12, "it trains", 300)
        slurm.kill_node(slurm.nodes[1])
        whole.submit(f"run_dir={whole.run_dir}", *ranks, "slurm.sbatch.exclude=" + slurm.nodes[1])
        for each in (whole, broken):
            assert each.wait_until_ended("train", timeout=400)["state"] == "done"
        assert broken.attempts("train")[-1] == "0" and len(broken.attempts("train")) >= 2
        assert curve(broken) == curve(whole) and len(curve(whole)) == 30
    finally:
        slurm.reset()


def curve(chain: Chain) -> dict[int, Any]:
    """Step -> loss."""
    metrics = chain.run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return {line["step"]: line["loss"] for line in found if "step" in line}
