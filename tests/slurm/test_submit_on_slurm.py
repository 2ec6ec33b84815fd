"""What `submit` sends to a real Slurm, and what of it reaches the ranks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from chains import Chain, fake_chain
from local_slurm import LocalSlurm, wait_until

FINISH = {"first": ["finish"], "second": ["finish"]}
SECRET = "hunter2-of-the-user"


@pytest.fixture
def chain(slurm: LocalSlurm, tmp_path: Path) -> Iterator[Chain]:
    yield fake_chain(slurm, tmp_path, FINISH)
    slurm.reset()


def queued(slurm: LocalSlurm) -> list[str]:
    return slurm.run("squeue", "--noheader", "--format=%A").split()


def test_a_dry_run_shows_the_very_files_and_leaves_nothing(chain: Chain) -> None:
    said = json.loads(chain.run("submit", "--dry-run", "--json", target=chain.file))
    assert said["asked_slurm"] is True
    assert not chain.run_dir.exists() and not queued(chain.slurm)
    ids = chain.submit()
    assert said["files"] == {path: Path(path).read_text() for path in said["files"]}
    scripts = [chain.job(name) / "job.sbatch" for name in FINISH]
    assert set(map(str, scripts)) < set(said["files"])
    commands = [command.replace("<first>", str(ids["first"][0])) for command in said["commands"]]
    assert commands == [
        f"sbatch {scripts[0]}",
        f"sbatch --dependency='afterok:{ids['first'][0]}' {scripts[1]}",
    ]


def test_a_dry_run_hands_on_what_slurm_has_against_a_job(chain: Chain) -> None:
    said = chain.run("submit", "--dryrun", "cluster.partition=nowhere", target=chain.file, status=2)
    assert "first: sbatch --test-only:" in said and "Invalid partition" in said
    assert not chain.run_dir.exists()


def test_a_refusal_half_way_leaves_nothing_in_the_queue(chain: Chain) -> None:
    said = chain.run("submit", "second.slurm.sbatch.constraint=nosuch", target=chain.file, status=2)
    assert "Invalid feature specification" in said
    wait_until(lambda: not queued(chain.slurm), "the first job is cancelled")
    assert not (chain.run_dir / "chain.json").exists()
    assert "submit it first" in chain.run("status", status=2)
    chain.submit()
    assert chain.wait_until_ended("second")["state"] == "done"


def test_a_chain_in_the_queue_is_not_submitted_again(chain: Chain) -> None:
    chain.submit("first.slurm.sbatch.hold=true")
    assert "is queued; cancel it" in chain.run("submit", target=chain.file, status=2)
    assert "is queued; cancel it" in chain.run("submit", "--again", target=chain.file, status=2)
    assert len(queued(chain.slurm)) == 2
    chain.run("cancel")
    assert "`resume` continues it" in chain.run("submit", target=chain.file, status=2)
    chain.run("submit", "--again", target=chain.file)
    assert chain.wait_until_ended("second")["state"] == "done"


# what a shell inside `salloc` may hold, and a user's own variables that filter or override
LEAKS = {
    "SLURM_JOB_ID": "1", "SLURM_NTASKS": "7", "SLURM_NNODES": "3", "SLURM_CPUS_PER_TASK": "5", "SLURM_MEM_PER_CPU": "1",
    "SLURM_MEM_PER_NODE": "2", "SLURM_MEM_PER_GPU": "3", "SRUN_CPUS_PER_TASK": "9", "SBATCH_TIMELIMIT": "1",
    "SBATCH_ARRAY_INX": "0-3", "SBATCH_JOB_NAME": "interactive", "SQUEUE_STATES": "FAILED",
    "SQUEUE_PARTITION": "interactive", "SCANCEL_STATE": "RUNNING", "CUDA_VISIBLE_DEVICES": "5",
}  # fmt: skip


def test_a_salloc_shell_does_no_harm(chain: Chain) -> None:
    """Neither to what `submit` sends and `status` sees, nor to the ranks of a script that is sent by hand."""
    chain.submit("first.slurm.sbatch.hold=true", env=LEAKS)
    job = chain.slurm.job(chain.ids("first")[0])
    assert (job["TimeLimit"], "ArrayJobId" in job) == ("00:30:00", False) and job["JobName"].startswith(
        "fake.first."
    )
    seen = json.loads(chain.run("status", "--json", env=LEAKS))["jobs"]
    assert [state["state"] for state in seen.values()] == ["waiting", "waiting"]
    chain.run("cancel", env=LEAKS)
    wait_until(lambda: not queued(chain.slurm), "all are cancelled")
    by_hand = {k: v for k, v in LEAKS.items() if not k.startswith(("SBATCH", "SQUEUE", "SCANCEL"))}
    script = str(chain.job("first") / "job.sbatch")
    text = Path(script).read_text().replace("#SBATCH --hold\n", "")
    Path(script).write_text(text)
    env = {**chain.slurm.env, **by_hand}
    subprocess.run(["sbatch", script], env=env, check=True, capture_output=True, timeout=60)
    wait_until((chain.job("first") / "done").exists, "a script that was sent by hand succeeds")
    ranks = (chain.job("first") / "ranks").read_text().splitlines()
    assert len(ranks) == 4 and all("of 4, local" in line for line in ranks)


def test_squeue_tells_names_and_scripts_by_which_jobs_are_found(chain: Chain) -> None:
    """A record that lost its ids: status, submit and cancel know the jobs nevertheless."""
    ids = chain.submit("first.slurm.sbatch.hold=true")
    file = chain.run_dir / "chain.json"
    known = json.loads(file.read_text())
    for job in known["jobs"].values():
        job["ids"] = []
    file.write_text(json.dumps(known))
    assert [(s["state"], s["id"]) for s in chain.states().values()] == [
        ("waiting", ids["first"][0]), ("waiting", ids["second"][0]),
    ]  # fmt: skip
    file.unlink()
    said = chain.run("submit", "first.slurm.sbatch.hold=true", target=chain.file, status=2)
    assert f"`scancel {ids['first'][0]} {ids['second'][0]}`" in said
    other = chain.run("submit", "run_dir=another", target=chain.file, status=2)
    assert "the run_dir of first, belongs to job" in other
    chain.slurm.run("scancel", *(str(i) for each in ids.values() for i in each))
    wait_until(lambda: not queued(chain.slurm), "all are cancelled")
    chain.submit()
    assert chain.wait_until_ended("second")["state"] == "done"


def test_directives_are_understood_by_slurm(chain: Chain) -> None:
    chain.submit(
        "cluster.partition=interactive",
        "cluster.gpus_per_node=8",
        "first.slurm.sbatch={hold: true, comment: a b}",
    )
    job = chain.slurm.job(int(chain.ids("first")[0]))
    said = {
        key: job[key] for key in ("Partition", "NumNodes", "TresPerNode", "TimeLimit", "Requeue", "Comment")
    }
    assert said == {
        "Partition": "interactive",
        "NumNodes": "2-2",
        "TresPerNode": "gres:gpu:2",
        "TimeLimit": "00:30:00",
        "Requeue": "1",
        "Comment": "a",
    }  # fmt: skip
    assert chain.slurm.job(int(chain.ids("second")[0]))["Dependency"].startswith(
        f"afterok:{chain.ids('first')[0]}"
    )


def test_setup_environment_template_and_log_folder(slurm: LocalSlurm, tmp_path: Path) -> None:
    """The value of a variable reaches every rank, and no file of the run folder."""
    from elastic_megatron import slurm as package

    script = (Path(package.__path__[0]) / "job.sbatch").read_text()
    assert "before=" in script
    (tmp_path / "site.sbatch").write_text(script.replace("before=", "echo template of the site\nbefore="))
    cluster = f"environment: [HF_TOKEN]\nsetup: ['export FROM_SETUP=\"a b\"']\ntemplate: site.sbatch\nlog_dir: {tmp_path}/logs"
    chain = fake_chain(slurm, tmp_path, {"first": ["finish"]}, cluster=cluster)
    trainer = tmp_path / "tools" / "elastic-megatron"
    trainer.write_text(
        trainer.read_text().replace(
            "#!/bin/bash", f"#!/bin/bash\nprintenv FROM_SETUP HF_TOKEN >{tmp_path}/env.$RANK"
        )
    )
    chain.submit(env={"HF_TOKEN": SECRET})
    assert chain.wait_until_ended("first")["state"] == "done"
    assert [(tmp_path / f"env.{rank}").read_text() for rank in range(4)] == [f"a b\n{SECRET}\n"] * 4
    log = chain.log("first", 1)
    assert "template of the site" in log and "rank 3 starts" in log
    assert (chain.job("first") / "logs" / "attempt_1.log").resolve().is_relative_to(tmp_path / "logs")
    files = [p for folder in (chain.run_dir, tmp_path / "logs") for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 5 and not [p for p in files if SECRET in p.read_text(errors="replace")]


def test_container_flags_reach_the_tasks(slurm_with_pyxis: LocalSlurm, tmp_path: Path) -> None:
    """Ranks run `elastic-megatron` from their PATH, as the image's would."""
    image = "nvcr.io#nvidia/pytorch:26.01-py3"
    cluster = (
        "environment: [HF_TOKEN]\n"
        f"container: {{runtime: pyxis, image: '{image}', mounts: [{tmp_path}], arguments: [--container-writable]}}"
    )
    chain = fake_chain(slurm_with_pyxis, tmp_path, {"first": ["finish"]}, cluster=cluster)
    trainer = tmp_path / "tools" / "elastic-megatron"
    trainer.write_text(
        trainer.read_text().replace(
            "#!/bin/bash", f"#!/bin/bash\nenv | grep PYXIS_STUB >{tmp_path}/env.$RANK"
        )
    )
    chain.submit(env={"PATH": f"{tmp_path}/tools:{os.environ['PATH']}", "HF_TOKEN": "x"})
    assert chain.wait_until_ended("first")["state"] == "done"
    for rank in range(4):
        seen = dict(line.split("=", 1) for line in (tmp_path / f"env.{rank}").read_text().splitlines())
        assert seen == {
            "PYXIS_STUB_CONTAINER_IMAGE": image,
            "PYXIS_STUB_CONTAINER_MOUNTS": f"{tmp_path}:{tmp_path}",
            "PYXIS_STUB_CONTAINER_ENV": "HF_TOKEN",
            "PYXIS_STUB_NO_CONTAINER_MOUNT_HOME": "1",
            "PYXIS_STUB_CONTAINER_WRITABLE": "1",
        }


# what a stand-in for the runtime does: note its arguments, and run what follows the image on the node
RUNTIME = """#!/bin/bash
printf '%s\\n' "$@" >{folder}/arguments.$RANK
while [[ $1 != {image} ]]; do shift; done
shift; exec "$@"
"""


@pytest.mark.parametrize("runtime", ["apptainer", "docker"])
def test_other_runtimes_start_the_ranks(slurm: LocalSlurm, tmp_path: Path, runtime: str) -> None:
    image = tmp_path / "an image.sif"
    image.touch()
    cluster = (
        "gpus_per_node: 2\nenvironment: [HF_TOKEN]\n"
        f"container: {{runtime: {runtime}, image: {image}, mounts: [{tmp_path}], arguments: [--pwd=/a b]}}"
    )
    chain = fake_chain(slurm, tmp_path, {"first": ["finish"]}, cluster=cluster)
    program = tmp_path / "tools" / runtime
    program.write_text(RUNTIME.format(folder=tmp_path, image=f"'{image}'"))
    program.chmod(0o755)
    chain.submit(env={"PATH": f"{tmp_path}/tools:{os.environ['PATH']}", "HF_TOKEN": SECRET})
    assert chain.wait_until_ended("first")["state"] == "done"
    mount = {"apptainer": f"--bind={tmp_path}", "docker": f"--volume={tmp_path}:{tmp_path}"}[runtime]
    gpus = {"apptainer": "--nv", "docker": "--gpus=all"}[runtime]
    recipe = str(chain.job("first") / "recipe.yaml")
    for rank in range(4):
        said = (tmp_path / f"arguments.{rank}").read_text().splitlines()
        assert {mount, gpus, "--pwd=/a b"} < set(said)
        assert said[said.index(str(image)) :] == [str(image), "elastic-megatron", "train", recipe]
        assert not [word for word in said if SECRET in word]
        if runtime == "docker":
            names = {word.removeprefix("--env=") for word in said if word.startswith("--env=")}
            assert {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HF_TOKEN"} <= names
