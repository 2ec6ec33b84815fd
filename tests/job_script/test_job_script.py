"""A job script, run by bash: what reaches the ranks, what their statuses lead to, and that no path can break it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from job_shell import Machine

from elastic_megatron.errors import UserError
from elastic_megatron.recipe import load_jobs
from elastic_megatron.slurm import record
from elastic_megatron.slurm.script import files_of

CLUSTERS = {
    "none": "container: {{runtime: none, bin: {bin}}}",
    "pyxis": "container: {{runtime: pyxis, image: IMAGE, mounts: [{root}]}}",
    "apptainer": "container: {{runtime: apptainer, image: IMAGE, mounts: [{root}]}}",
    "docker": "container: {{runtime: docker, image: IMAGE, mounts: [{root}]}}",
}


def machine(root: Path, cluster: str = "none", more: str = "", **fields: Any) -> Machine:
    text = CLUSTERS[cluster].format(bin=root / "bin", root=root) + "\n" + more
    return Machine(root, cluster=text, **fields)


@pytest.mark.parametrize("runtime", CLUSTERS)
def test_every_rank_learns_its_place_in_any_container(tmp_path: Path, runtime: str) -> None:
    here = machine(tmp_path, runtime, "environment: [WANDB_ENTITY]")
    assert here.run(WANDB_ENTITY="team") == 0
    seen = [rank["environment"] for rank in here.ranks()]
    place = {"WORLD_SIZE": "4", "MASTER_ADDR": "first", "MASTER_PORT": str(15000 + 12345 % 10000)}
    place |= {"SRUN_DEBUG": None, "SLURM_MEM_PER_CPU": None}
    assert seen == [
        place | {"RANK": str(r), "LOCAL_RANK": str(r % 2), "OMP_NUM_THREADS": "1", "WANDB_ENTITY": "team"}
        for r in range(4)
    ]
    assert [r["arguments"] for r in here.ranks()] == [["train", str(here.job / "recipe.yaml")]] * 4


def test_torchrun_is_one_agent_a_node(tmp_path: Path) -> None:
    here = machine(tmp_path, more="launcher: torchrun")
    assert here.run() == 0
    first, second = _halves(here.called("torchrun"))
    assert "--nnodes=2" in first and "--nproc-per-node=2" in first
    assert ("--node-rank=0" in first, "--node-rank=1" in second) == (True, True)
    assert "--master-addr=first" in first and f"--master-port={15000 + 12345 % 10000}" in first
    assert any(flag.startswith("--signals-to-handle=") and "SIGUSR1" in flag for flag in first)
    assert "--shutdown-timeout=300" in first and "--max-restarts=0" in first


def _halves(lines: list[str]) -> tuple[list[str], list[str]]:
    return lines[: len(lines) // 2], lines[len(lines) // 2 :]


@pytest.mark.parametrize(
    ("runtime", "program", "flags"),
    [
        ("pyxis", "srun", ["--container-image=IMAGE", "--container-mounts={root}:{root}", "--no-container-mount-home",
                           "--container-env=WANDB_ENTITY"]),
        ("apptainer", "apptainer", ["--nv", "--bind={root}"]),
        ("docker", "docker", ["--gpus=all", "--volume={root}:{root}", "--env=WANDB_ENTITY", "--network=host"]),
    ],
)  # fmt: skip
def test_a_container_gets_its_mounts_gpus_and_named_variables(
    tmp_path: Path, runtime: str, program: str, flags: list[str]
) -> None:
    here = machine(tmp_path, runtime, "environment: [WANDB_ENTITY]\ngpus_per_node: 2")
    assert here.run() == 0
    called = here.called(program)
    assert [f for f in flags if f.format(root=tmp_path) not in called] == []


def test_success_is_noted_and_never_repeated(tmp_path: Path) -> None:
    here = machine(tmp_path)
    assert here.run(here.save(10)) == 0
    assert record.done(tmp_path / "run", "train")
    (attempt,) = record.attempts(tmp_path / "run", "train")
    assert (attempt.number, attempt.id, attempt.exit, attempt.progress) == (1, 12345, 0, "10")
    assert (here.job / "logs" / "latest").resolve() == here.job / "logs" / "attempt_1.log"
    assert here.run("exit 1") == 0  # a link that is not needed
    assert len(here.ranks()) == 4 and len(record.attempts(tmp_path / "run", "train")) == 1


@pytest.mark.parametrize("status", [75, 1, 7])
def test_with_a_newer_checkpoint_it_goes_back_to_the_queue_for_ever(tmp_path: Path, status: int) -> None:
    here = machine(tmp_path, slurm="continuation: {kind: requeue, max_failures: 2}")
    for attempt in range(1, 5):
        assert here.run(here.save(attempt) + f"exit {status}") == -15
        assert len(here.called("scontrol")) == attempt
    assert here.called("scontrol") == ["requeue 12345"] * 4
    assert [a.exit for a in record.attempts(tmp_path / "run", "train")] == [status] * 4


@pytest.mark.parametrize("status", [75, 7])
def test_without_one_it_gives_up(tmp_path: Path, status: int) -> None:
    """Also where it was told to save: else a lead longer than the time to the first step would never end."""
    here = machine(tmp_path, slurm="continuation: {kind: requeue, max_failures: 3}")
    assert [here.run(f"exit {status}") for _ in range(3)] == [-15, -15, status]
    assert record.failures(tmp_path / "run", "train") == 3
    ranks = len(here.ranks())
    assert here.run() == 1 and len(here.ranks()) == ranks  # not even tried again


def test_a_newer_checkpoint_forgives_earlier_failures(tmp_path: Path) -> None:
    here = machine(tmp_path, slurm="continuation: {kind: requeue, max_failures: 2}")
    assert here.run("exit 7") == -15 and record.failures(tmp_path / "run", "train") == 1
    assert here.run(here.save(3) + "exit 7") == -15 and record.failures(tmp_path / "run", "train") == 0


def test_bad_input_is_never_tried_again(tmp_path: Path) -> None:
    here = machine(tmp_path)
    assert here.run("exit 2") == 2 and here.called("scontrol") == []
    assert here.run() == 1 and len(here.ranks()) == 4


def test_the_first_rank_to_fail_says_why(tmp_path: Path) -> None:
    """srun's status is the highest: that of ranks which it ended because one failed."""
    here = machine(tmp_path)
    assert here.run("test $RANK = 0 && exit 2; exit 143") == 2
    assert [a.exit for a in record.attempts(tmp_path / "run", "train")] == [2]


@pytest.mark.parametrize("kind", ["none", "chain, links: 2"])
def test_other_continuations_end_with_the_status(tmp_path: Path, kind: str) -> None:
    """The next link, or nobody, goes on: Slurm decides that by itself."""
    here = machine(tmp_path, slurm=f"continuation: {{kind: {kind}}}")
    assert here.run(here.save(1) + "exit 75") == 75
    assert here.called("scontrol") == []


def test_usr1_reaches_the_ranks_and_counts_as_continue_me(tmp_path: Path) -> None:
    """Slurm signals the batch shell; the stand-in srun dies of the signal, as a launcher may that knows no better."""
    here = machine(tmp_path)
    signal = "test $RANK = 0 || exit 0; sleep 0.3; script=$(pgrep -o -f jobs/train/job.sbatch); kill -USR1 $script; sleep 3"
    assert here.run(here.save(5) + signal) == -15
    assert here.called("scontrol") == ["requeue 12345"]
    assert [a.exit for a in record.attempts(tmp_path / "run", "train")] == [75]


def test_term_saves_and_stays_out_of_the_queue(tmp_path: Path) -> None:
    """`scancel`: a job that requeued itself now would come back from the dead."""
    here = machine(tmp_path)
    signal = "script=$(pgrep -o -f jobs/train/job.sbatch); kill -TERM $script; sleep 0.3; exit 143"
    assert here.run(here.save(5) + signal) == 143
    assert here.called("scontrol") == []


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        "quote's",
        'double"s',
        "`id` (x) #y",
        "semi;colon & | >x",
        "ünï",
        "-dash",
        "per%cent",
    ],
)
def test_a_run_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    here = machine(tmp_path, run_dir=name)
    assert here.run(here.save(1)) == 0
    assert here.ranks()[0]["arguments"] == ["train", str(tmp_path / name / "jobs/train/recipe.yaml")]
    assert record.done(tmp_path / name, "train")


@settings(max_examples=25)
@given(
    st.text(
        st.characters(codec="utf-8", exclude_characters="/", exclude_categories=("C", "Z")),
        min_size=1,
        max_size=12,
    )
)
def test_no_name_makes_a_script_that_bash_cannot_read(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    if name in (".", "..") or "$" in name or name.startswith("~"):
        return
    root = tmp_path_factory.mktemp("names")
    chain = machine(root, run_dir=name).chain()
    script = files_of(chain)[chain.run_dir / "jobs/train/job.sbatch"]
    done = subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("@{directives} @{tasks} @{taskz}", "knows no @{taskz}"),
        ("@{directives}", "lacks @{tasks}"),
        ("@{tasks}", "lacks @{directives}"),
    ],
)
def test_a_template_is_filled_in_completely_or_refused(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "mine.sbatch").write_text(text)
    here = machine(tmp_path, more="template: mine.sbatch")
    with pytest.raises(UserError, match="mine.sbatch: ") as error:
        here.chain()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_template_of_ones_own_is_what_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.sbatch").write_text(
        "#!/bin/bash\n@{directives}\n@{setup}\necho $GREETING >@{job}/mine\n@{tasks}\n"
    )
    here = machine(tmp_path, more="template: mine.sbatch\nsetup: [export GREETING=hello]")
    assert here.run() == 0
    assert (here.job / "mine").read_text() == "hello\n" and len(here.ranks()) == 4


def test_the_resolved_chain_means_the_same_jobs(tmp_path: Path) -> None:
    """`submit RUN_DIR/chain.yaml` sends what was sent, but for the scripts' own words."""
    chain = machine(tmp_path, slurm='time: "1:00:00"').chain()
    again = load_jobs(chain.run_dir / "chain.yaml")
    assert again.run_dir == chain.run_dir and again.cluster == chain.cluster
    assert [(j.name, j.recipe, j.nodes, j.ranks_per_node, j.time) for j in again.jobs] == [
        (j.name, j.recipe, j.nodes, j.ranks_per_node, j.time) for j in chain.jobs
    ]
    assert (
        files_of(again)[chain.run_dir / "jobs/train/job.sbatch"]
        == files_of(chain)[chain.run_dir / "jobs/train/job.sbatch"]
    )


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
@pytest.mark.parametrize("runtime", CLUSTERS)
def test_a_job_that_quantises_runs_on_its_ranks_as_one_that_ranks_does(
    tmp_path: Path, runtime: str, launcher: str
) -> None:
    """In any layout, without signals: it has no checkpoint on its way."""
    text = (
        CLUSTERS[runtime].format(bin=tmp_path / "bin", root=tmp_path)
        + f"\nlauncher: {launcher}\ngpus_per_node: 2\n"
    )
    (tmp_path / "cluster.yaml").write_text(text)
    (tmp_path / "bin").mkdir()
    common = (
        "run_dir: run\nmodel: {hf: parent}\ndata: {train: [{path: text, weight: 1}]}\nslurm: {nodes: 2}\n"
    )
    (tmp_path / "rank.yaml").write_text(f"name: r\njob: rank\n{common}")
    (tmp_path / "quantize.yaml").write_text(f"name: r\njob: quantize\nquantize: {{format: fp8}}\n{common}")
    jobs = "{rank: {recipe: rank.yaml}, quantize: {recipe: quantize.yaml}}"
    (tmp_path / "chain.yaml").write_text(f"name: c\ncluster: cluster.yaml\nrun_dir: runs\njobs: {jobs}\n")
    files = files_of(load_jobs(tmp_path / "chain.yaml"))
    ranked, quantised = (files[tmp_path / "runs/jobs" / name / "job.sbatch"] for name in ("rank", "quantize"))
    recipe = tmp_path / "runs/jobs/quantize/recipe.yaml"
    assert f"elastic-megatron quantize {recipe}" in quantised and "--signal=" not in quantised
    renamed = ranked.replace("jobs/rank", "jobs/quantize").replace("c.rank", "c.quantize")
    assert (
        renamed.replace("Job rank", "Job quantize").replace("megatron rank", "megatron quantize") == quantised
    )
    assert load_jobs(recipe_chain(tmp_path, files)).job("quantize").recipe.quantize is not None


def recipe_chain(folder: Path, files: dict[Path, str]) -> Path:
    """The written chain, which loads by itself."""
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "runs/chain.yaml"
