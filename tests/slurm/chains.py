"""Chains for the tests: the shipped recipes in a folder of their own, and jobs whose ranks are `fake_trainer.sh`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from local_slurm import LocalSlurm, wait_until

REPOSITORY = Path(__file__).parents[2]
PROGRAM = Path(sys.executable).parent / "elastic-megatron"
TRACKER = "checkpoints/latest_checkpointed_iteration.txt"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@dataclass(frozen=True)
class Chain:
    """A chain file and what the command line says about it. `status` of a method: the exit status it must have."""

    slurm: LocalSlurm
    file: Path
    run_dir: Path

    def command(self, verb: str, *arguments: str, target: Path | None = None) -> list[str]:
        return [str(PROGRAM), verb, str(target or self.run_dir), *arguments]

    def run(
        self,
        verb: str,
        *arguments: str,
        status: int = 0,
        target: Path | None = None,
        env: Mapping[str, str] = {},
    ) -> str:
        """Standard output; of a command that fails, its standard error."""
        command = self.command(verb, *arguments, target=target)
        done = subprocess.run(
            command,
            env={**self.slurm.env, **env},
            cwd=self.file.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stderr if status else done.stdout

    def submit(self, *overrides: str, env: Mapping[str, str] = {}) -> dict[str, list[int]]:
        """Ids by job."""
        return json.loads(self.run("submit", *overrides, "--json", target=self.file, env=env))["jobs"]

    def states(self) -> dict[str, dict[str, Any]]:
        """What ``status --json`` says of each job."""
        return json.loads(self.run("status", "--json"))["jobs"]

    def job(self, name: str) -> Path:
        """The job's folder."""
        return self.run_dir / "jobs" / name

    def ids(self, name: str) -> list[int]:
        """All ids that the job ever had."""
        return json.loads((self.run_dir / "chain.json").read_text())["jobs"][name]["ids"]

    def attempts(self, name: str) -> list[str]:
        """Exit status of each attempt, "" while it runs or where it was cut off."""
        path = self.job(name) / "attempts"
        exits: dict[str, str] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            number, _, _, event, status, _ = line.split()
            exits[number] = status if event == "exit" else ""
        return list(exits.values())

    def log(self, name: str, attempt: int) -> str:
        return (self.job(name) / "logs" / f"attempt_{attempt}.log").read_text()

    def wait_until_ended(self, name: str, timeout: float = 60) -> dict[str, Any]:
        """The job's state by ``status``, once Slurm has nothing more to do for it."""
        last = self.ids(name)[-1]
        what = f"{name} of {self.run_dir} ends"
        try:
            wait_until(lambda: self.slurm.job(last)["JobState"] in ENDED, what, timeout)
        except AssertionError as error:
            logs = [f"{path}\n{path.read_text()}" for path in self.run_dir.glob("jobs/*/logs/*.log")]
            raise AssertionError("\n".join([str(error), self.slurm.run("squeue"), *logs])) from None
        return self.states()[name]

    def wait_until_waiting(self, name: str, attempt: int = 1, ranks: int = 4) -> list[int]:
        """Process ids of the fake ranks, once all of an attempt can be signalled."""
        paths = [self.job(name) / f"waiting.{attempt}.{rank}" for rank in range(ranks)]
        wait_until(lambda: all(p.exists() and p.read_text() for p in paths), f"{name} waits for a signal")
        return [int(path.read_text()) for path in paths]

    def signals(self, name: str) -> list[str]:
        """Sorted "ATTEMPT RANK SIGNAL" lines of the fake ranks."""
        path = self.job(name) / "signals"
        return sorted(path.read_text().splitlines()) if path.exists() else []

    def send_usr1(self, name: str) -> None:
        """As Slurm does before the time limit: to the batch shell alone (--signal=B:USR1@...)."""
        running = [i for i in self.ids(name) if self.slurm.job(i)["JobState"] == "RUNNING"]
        assert len(running) == 1, running
        self.slurm.run("scancel", "--batch", "--signal=USR1", str(running[0]))


def copy_recipes(folder: Path) -> Path:
    """The shipped recipes, whose paths lead to ``folder/runs``; the folder of those for the CPU."""
    shutil.copytree(REPOSITORY / "recipes", folder / "recipes")
    return folder / "recipes" / "tiny_cpu"


def pretend_data(folder: Path) -> None:
    """Files where the recipes expect token files and a tokenizer: enough for what reads no data."""
    data = folder / "runs" / "tiny_cpu" / "data"
    (data / "train_tokenizer").mkdir(parents=True)
    for name in ("train", "valid"):
        (data / f"{name}.bin").touch()
        (data / f"{name}.idx").touch()


def fake_chain(
    slurm: LocalSlurm,
    folder: Path,
    plans: Mapping[str, Sequence[str]],
    *,
    continuation: str = "{kind: requeue}",
    cluster: str = "",
    run_dir: str = "run",
) -> Chain:
    """A chain of jobs that train nothing, each after the one before, on two nodes with two ranks each.

    Args:
        plans: job -> what `fake_trainer.sh` does in each attempt.
        continuation: the first job's, as one line of YAML.
        cluster: further lines of the cluster file; without a container, jobs find the fake trainer.
        run_dir: of the chain, below `folder`.
    """
    recipes = copy_recipes(folder)
    pretend_data(folder)
    tools = fake_tools(folder, plans)
    if "container:" not in cluster:
        cluster += f"\ncontainer: {{runtime: none, bin: {tools}}}\n"
    (folder / "cluster.yaml").write_text(f'time: "0:10:00"\n{cluster}')
    jobs, before = [], ""
    for name in plans:
        own = continuation if not before else "{kind: requeue}"
        (folder / f"{name}.yaml").write_text(
            f"extends: {recipes / 'parent.yaml'}\nname: {name}\nrun_dir: work/{name}\n"
            f"slurm: {{ranks_per_node: 2, continuation: {own}}}\n"
            "stages: [{name: all, tokens: 1.6e6, seq_length: 256, global_batch_size: 8, micro_batch_size: 2}]\n"
        )
        jobs.append(f"  {name}: {{recipe: {name}.yaml, after: [{before}]}}")
        before = name
    file = folder / "chain.yaml"
    file.write_text(
        "\n".join(["name: fake", "cluster: cluster.yaml", f"run_dir: {run_dir}", "jobs:", *jobs, ""])
    )
    return Chain(slurm, file, folder / run_dir)


def real_chain(slurm: LocalSlurm, folder: Path) -> Chain:
    """`recipes/tiny_cpu/chain.yaml` in a folder of its own, with the data that it wants."""
    from elastic_megatron.data.prepare import prepare
    from elastic_megatron.data.tokenizer import byte_tokenizer

    recipes, run_dir = copy_recipes(folder), folder / "runs" / "tiny_cpu"
    tokenizer = run_dir / "data" / "train_tokenizer"
    byte_tokenizer().save_pretrained(tokenizer)
    for name in ("train", "valid"):
        text = REPOSITORY / "examples" / "data" / f"shakespeare_{name}.txt"
        prepare([text], run_dir / "data" / name, tokenizer)
    return Chain(slurm, recipes / "chain.yaml", run_dir)


def fake_tools(folder: Path, plans: Mapping[str, Sequence[str]]) -> Path:
    """A folder with the fake trainer under the name of the real one, its plans, and the real torchrun."""
    tools = folder / "tools"
    tools.mkdir()
    shutil.copy(Path(__file__).parent / "fake_trainer.sh", tools / "elastic-megatron")
    (tools / "torchrun").symlink_to(PROGRAM.parent / "torchrun")
    for name, plan in plans.items():
        (tools / f"plan.{name}").write_text(" ".join(plan) + "\n")
    return tools
