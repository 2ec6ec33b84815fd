"""Run job scripts by bash alone: Slurm's and the containers' commands are stand-ins that note how they were called."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from elastic_megatron.recipe import JobChain, load_jobs
from elastic_megatron.slurm.script import job_dir, script_path
from elastic_megatron.slurm.submission import write

PYTHON = f"#!{sys.executable}\n"
# runs the command behind the flags once for every rank, one after another; the worst status is its own
SRUN = """
import os, subprocess, sys
flags = [a for a in sys.argv[1:] if a.startswith("--")]
command = sys.argv[1 + len(flags):]
assert sys.argv[1:1 + len(flags)] == flags, "a flag stands behind the command"
open(os.environ["CALLS"] + "/srun", "a").write("\\n".join(flags) + "\\n")
nodes, per_node = int(os.environ["SLURM_NNODES"]), int(os.environ["SLURM_NTASKS_PER_NODE"])
worst = 0
for rank in range(nodes * per_node):
    slurm = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % per_node, "SLURM_NODEID": rank // per_node,
             "SLURM_NTASKS": nodes * per_node}
    env = os.environ | {name: str(value) for name, value in slurm.items()}
    status = subprocess.run(command, env=env, timeout=30).returncode
    worst = max(worst, status)
    if status > 0:
        print(f"srun: error: node{rank // per_node}: task {rank}: Exited with exit code {status}", file=sys.stderr, flush=True)
sys.exit(worst)
"""
# a requeued job's shell is ended by Slurm
SCONTROL = """
import os, signal, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    sys.exit("unknown option") if "NO_HOSTNAMES" in os.environ else print("first\\nsecond")
else:
    calls = os.environ["CALLS"] + "/scontrol"
    open(calls, "a").write(" ".join(sys.argv[1:]) + "\\n")
    if len(open(calls).readlines()) <= int(os.environ.get("REFUSED_REQUEUES", "0")):
        sys.exit("Requested operation is presently disabled")
    os.kill(os.getppid(), signal.SIGTERM)
"""
# the pauses between requeues that fail; other sleeps are real
SLEEP = """
import os, sys, time
open(os.environ["CALLS"] + "/sleep", "a").write(sys.argv[1] + "\\n")
if "REFUSED_REQUEUES" not in os.environ:
    time.sleep(float(sys.argv[1]))
"""
# a container has an environment of its own: apptainer takes over the task's, docker what it is told to
CONTAINER = """
import os, sys
name, image = os.path.basename(sys.argv[0]), sys.argv.index("IMAGE")
open(os.environ["CALLS"] + "/" + name, "a").write("\\n".join(sys.argv[1:image]) + "\\n")
env = dict(os.environ)
if name == "docker":
    named = [a.removeprefix("--env=") for a in sys.argv[1:image] if a.startswith("--env=")]
    env = {n: env[n] for n in [*named, "PATH", "CALLS", "FAKE"] if n in env}
os.execvpe(sys.argv[image + 1], sys.argv[image + 1:], env)
"""
SEEN = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "WANDB_ENTITY",
    "SRUN_DEBUG", "SLURM_MEM_PER_CPU",
)  # fmt: skip
# FAKE is shell: what a rank does
ELASTIC = f"""
import json, os, subprocess, sys
line = {{"arguments": sys.argv[1:], "environment": {{n: os.environ.get(n) for n in {SEEN!r}}}}}
open(os.environ["CALLS"] + "/elastic-megatron", "a").write(json.dumps(line) + "\\n")
sys.exit(subprocess.run(["bash", "-c", os.environ.get("FAKE", "")]).returncode)
"""
TORCHRUN = """
import os, sys
open(os.environ["CALLS"] + "/torchrun", "a").write("\\n".join(sys.argv[1:]) + "\\n")
flags = [a for a in sys.argv[1:] if a.startswith("--")]
os.execvp(sys.argv[1 + len(flags)], sys.argv[1 + len(flags):])
"""
PROGRAMS = {
    "srun": SRUN, "scontrol": SCONTROL, "docker": CONTAINER, "apptainer": CONTAINER, "elastic-megatron": ELASTIC,
    "torchrun": TORCHRUN, "sleep": SLEEP,
}  # fmt: skip

RECIPE = """\
name: r
run_dir: {run_dir}
model:
  sizes:
    hybrid_layer_pattern: "-"
    hidden_size: 8
    vocab_size: 8
    ffn_hidden_size: 8
loss: {{kind: cross_entropy}}
stages:
  - {{name: a, tokens: 100, seq_length: 10, global_batch_size: 4}}
slurm: {{cluster: {cluster}, nodes: 2, ranks_per_node: 2, {slurm}}}
"""


@dataclass(frozen=True)
class Machine:
    """A folder with the stand-ins, a recipe, and a cluster file; ``run`` runs the job's script once."""

    root: Path
    cluster: str = ""
    slurm: str = ""
    run_dir: str = "run"
    overrides: tuple[str, ...] = field(default=())

    @property
    def programs(self) -> Path:
        return self.root / "bin"

    @property
    def calls(self) -> Path:
        return self.root / "calls"

    @property
    def job(self) -> Path:
        return job_dir(self.root / self.run_dir, "train")

    def chain(self) -> JobChain:
        """The job, its files written."""
        self.programs.mkdir(exist_ok=True)
        self.calls.mkdir(exist_ok=True)
        for name, text in PROGRAMS.items():
            (self.programs / name).write_text(PYTHON + text)
            (self.programs / name).chmod(0o755)
        # JSON is YAML, and quotes whatever a path holds
        quoted = {
            key: json.dumps(value, ensure_ascii=False)
            for key, value in (("run_dir", self.run_dir), ("cluster", str(self.root / "cluster.yaml")))
        }
        (self.root / "cluster.yaml").write_text(
            self.cluster or f"container: {{runtime: none, bin: {self.programs}}}\n"
        )
        (self.root / "recipe.yaml").write_text(RECIPE.format(**quoted, slurm=self.slurm))
        chain = load_jobs(self.root / "recipe.yaml", self.overrides)
        write(chain)
        return chain

    def run(self, fake: str = "", **environment: str) -> int:
        """Exit status of the script; the negative signal if one ended it. ``fake``: what every rank does, in shell."""
        chain = self.chain()
        job = chain.jobs[0]
        tasks = 1 if chain.cluster.launcher == "torchrun" else job.ranks_per_node
        env = {
            "PATH": f"{self.programs}:{os.environ['PATH']}", "CALLS": str(self.calls), "FAKE": fake,
            "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": str(job.nodes),
            "SLURM_NTASKS_PER_NODE": str(tasks), **environment,
        }  # fmt: skip
        path = script_path(chain.run_dir, job.name)
        return subprocess.run(["bash", str(path)], env=env, timeout=60, start_new_session=True).returncode

    def called(self, name: str) -> list[str]:
        """Lines that a stand-in noted."""
        path = self.calls / name
        return path.read_text().splitlines() if path.exists() else []

    def ranks(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.called("elastic-megatron")]

    def save(self, iteration: int) -> str:
        """Shell for `fake`: a checkpoint of this iteration becomes the newest."""
        folder = self.root / self.run_dir / "checkpoints"
        tracker = shlex.quote(str(folder / "latest_checkpointed_iteration.txt"))
        return f"mkdir -p {shlex.quote(str(folder))}; echo {iteration} >{tracker}; "
