"""The files of a chain: resolved recipes and one readable sbatch script a job. Pure text; nothing is written here."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoint.tracker import TRACKER
from ..errors import BAD_INPUT, DIVERGED, UserError
from ..recipe import JobChain, PlannedJob, Recipe, dump
from ..recipe.cluster import Apptainer, Cluster, Docker, NoContainer, Pyxis
from ..recipe.document import to_yaml
from ..recipe.slurm import Links, Once

# neither bad input nor a run that diverged gets better by another attempt
FINAL = (BAD_INPUT, DIVERGED)
REQUIRED = ("directives", "tasks")
RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")


def job_dir(run_dir: Path, name: str) -> Path:
    """Folder of a job's script, recipe, attempts and logs."""
    return run_dir / "jobs" / name


def log_dir(run_dir: Path, name: str) -> Path:
    """Folder of a job's logs: one of each attempt, and ``latest``, a link to the newest."""
    return job_dir(run_dir, name) / "logs"


def script_path(run_dir: Path, name: str) -> Path:
    """Where the script of a job lies."""
    return job_dir(run_dir, name) / "job.sbatch"


def links(job: PlannedJob) -> int:
    """How often a job's script is queued."""
    continuation = job.recipe.slurm.continuation
    return continuation.links if isinstance(continuation, Links) else 1


def files_of(chain: JobChain) -> dict[Path, str]:
    """Every file that `submit` writes before it sends the scripts: path -> text."""
    out = {
        chain.run_dir / "cluster.yaml": dump(chain.cluster),
        chain.run_dir / "chain.yaml": _resolved(chain),
    }
    for job in chain.jobs:
        folder = job_dir(chain.run_dir, job.name)
        out[folder / "recipe.yaml"] = dump(job.recipe)
        out[folder / "job.sbatch"] = script(chain, job)
    return out


def _resolved(chain: JobChain) -> str:
    """The chain over the files beside it, which says the same wherever the sources go."""
    jobs = {
        job.name: {"recipe": f"jobs/{job.name}/recipe.yaml", "after": list(job.after)} for job in chain.jobs
    }
    return to_yaml({"name": chain.name, "cluster": "cluster.yaml", "run_dir": ".", "jobs": jobs})


def script(chain: JobChain, job: PlannedJob) -> str:
    """The sbatch script of a job. Raises ``UserError`` where the cluster's template cannot be filled in."""
    continuation = job.recipe.slurm.continuation
    progress = (
        job.recipe.run_dir / "checkpoints" / TRACKER if job.recipe.job == "train" else Path("/dev/null")
    )
    values = {
        "directives": "\n".join(f"#SBATCH {line}" for line in _directives(chain, job)),
        "title": f"Job {job.name} of {chain.name}",
        "version": __version__,
        "job": shlex.quote(str(job_dir(chain.run_dir, job.name))),
        "progress": shlex.quote(str(progress)),
        "continuation": continuation.kind,
        "max_failures": str(1 if isinstance(continuation, Once) else continuation.max_failures),
        "final": " ".join(map(str, FINAL)),
        "setup": _setup(chain.cluster.setup),
        "tasks": _tasks(chain, job),
    }
    template = chain.cluster.template
    if template is None:
        return _filled(
            files("elastic_megatron.slurm").joinpath("job.sbatch").read_text(), values, "job.sbatch"
        )
    try:
        return _filled(template.read_text(), values, str(template))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{template}: the cluster file's template cannot be read: {error}") from None


def _setup(lines: Sequence[str]) -> str:
    """The site's lines, of which the first that fails ends the job: ranks would only fail later, and less clearly.

    ``a && b`` does not fail by ``a``, and what fails inside a function or a sourced file is its own business.
    """
    if not lines:
        return ""
    ends = """trap 'status=$? line=$LINENO; [ "${#BASH_SOURCE[@]}" -gt 1 ] || {
  why="a setup line of the cluster file failed: $(sed -n "${line}p" "$0")"; echo "$why (status $status)"; exit "$status"
}' ERR"""
    return "\n".join([ends, *lines, "trap - ERR"])


def _filled(template: str, values: Mapping[str, str], name: str) -> str:
    """`template` with every ``@{key}`` replaced; an empty value takes its line along."""
    used = set(re.findall(r"@\{(\w+)\}", template))
    if unknown := sorted(used - set(values)):
        raise UserError(f"{name}: knows no @{{{unknown[0]}}}; there are {', '.join(values)}")
    if missing := [key for key in REQUIRED if key not in used]:
        raise UserError(f"{name}: lacks @{{{missing[0]}}}, without which no job can run; add it")
    return re.sub(r"@\{(\w+)\}(\n?)", lambda m: values[m[1]] + m[2] if values[m[1]] else "", template)


def _directives(chain: JobChain, job: PlannedJob) -> Iterator[str]:
    """The options of sbatch, one a line, without ``#SBATCH``; it reads quotes as a shell does."""
    cluster = chain.cluster
    continuation, export = job.recipe.slurm.continuation, job.recipe.job == "export"
    yield f"--job-name={job_name(chain, job)}"
    for flag in ("account", "partition", "qos"):
        value = (export and getattr(cluster.export, flag)) or getattr(cluster, flag)
        if value is not None:
            yield f"--{flag}={shlex.quote(value)}"
    yield f"--nodes={job.nodes}"
    yield f"--ntasks-per-node={1 if cluster.launcher == 'torchrun' else job.ranks_per_node}"
    if cluster.gpus_per_node and cluster.request_gpus and not export:
        yield f"--gpus-per-node={job.ranks_per_node}"
    yield f"--time={job.time}"
    if not isinstance(continuation, Once) and job.recipe.job == "train":
        yield f"--signal=B:USR1@{continuation.lead}"
    yield "--no-requeue" if continuation.kind != "requeue" else "--requeue"
    logs = str(log_dir(chain.run_dir, job.name)).replace("%", "%%")
    yield f"--output={shlex.quote(logs + '/slurm_%j.log')}"
    yield "--open-mode=append"
    yield "--kill-on-invalid-dep=yes"
    yield "--export=ALL"  # a list of names would make Slurm start a login shell for the rest
    for flag, value in _flags(cluster, job.recipe).items():
        if value is True:
            yield f"--{flag}"
        elif value is not False:
            yield f"--{flag}={shlex.quote(str(value))}"


def _flags(cluster: Cluster, recipe: Recipe) -> dict[str, Any]:
    """Further options of sbatch: of every job, of those that export, of this one."""
    export = cluster.export.sbatch if recipe.job == "export" else {}
    return {**cluster.sbatch, **export, **recipe.slurm.sbatch}


def job_name(chain: JobChain, job: PlannedJob) -> str:
    """What the queue calls the job, and no job of another run folder.

    Links wait for each other by name, and a job whose id never arrived is found by it.
    """
    return f"{chain.name}.{job.name}.{_digest(chain.run_dir)}"


def queue_name(run_dir: Path, name: str) -> str:
    """What the queue calls a job whose script has been written; empty where that is not unique, or not known."""
    found = _stated(run_dir, name, "job-name")
    return found if found.endswith(f".{_digest(run_dir)}") else ""


def clusters(run_dir: Path, name: str) -> list[str]:
    """The clusters of which a written script names one or several; one without a name where it leaves that open."""
    return _stated(run_dir, name, "clusters").split(",")


def _stated(run_dir: Path, name: str, flag: str) -> str:
    try:
        text = script_path(run_dir, name).read_text(errors="replace")
    except OSError:
        return ""
    found = re.search(rf"^#SBATCH --{flag}=(\S+)$", text, re.MULTILINE)
    return found[1] if found else ""


def _digest(run_dir: Path) -> str:
    return hashlib.sha256(os.path.realpath(run_dir).encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _tasks(chain: JobChain, job: PlannedJob) -> str:
    """The srun that starts the ranks: flags, then what one task does."""
    cluster, container = chain.cluster, chain.cluster.container
    flags = ["srun", "--kill-on-bad-exit=1", "--export=ALL"]
    if _flags(cluster, job.recipe).get("cpus-per-task", False) is not False:
        # since Slurm 22.05 srun does not take it from the job by itself
        flags.append('--cpus-per-task="$SLURM_CPUS_PER_TASK"')
    if isinstance(container, Pyxis):
        flags += list(_pyxis(container, cluster.environment))
    if cluster.launcher == "srun":
        flags.append("--label")
        before = ["export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"]
    else:
        before = []
    command = [*_inside(chain, job), *_program(chain, job)]
    body = "\n".join(f"    {line}" for line in [*before, "exec " + " \\\n      ".join(command)])
    return " ".join(flags) + " bash -c " + shlex.quote(f"\n{body}\n  ")


def _program(chain: JobChain, job: PlannedJob) -> Iterator[str]:
    """What a task runs, in pieces that are quoted already."""
    container = chain.cluster.container
    folder = _bin(container) if isinstance(container, NoContainer) else None
    if chain.cluster.launcher == "torchrun":
        continuation = job.recipe.slurm.continuation
        grace = 30 if isinstance(continuation, Once) else continuation.lead
        yield _tool(folder, "torchrun") + " --no-python --max-restarts=0"
        yield f"--nnodes=$SLURM_NNODES --nproc-per-node={job.ranks_per_node} --node-rank=$SLURM_NODEID"
        yield "--master-addr=$MASTER_ADDR --master-port=$MASTER_PORT"
        # its agent passes on only the signals it is told of, and would end the ranks after 30 seconds
        yield f"--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout={grace}"
    recipe = shlex.quote(str(job_dir(chain.run_dir, job.name) / "recipe.yaml"))
    yield f"{_tool(folder, 'elastic-megatron')} {job.recipe.job} {recipe}"


def _tool(folder: Path | None, name: str) -> str:
    return shlex.quote(str(folder / name)) if folder else name


def _bin(container: NoContainer) -> Path:
    """Where jobs find elastic-megatron: the environment that submits, unless the cluster file says another."""
    if container.bin is not None:
        return container.bin
    own = Path(sys.executable).parent
    found = shutil.which("elastic-megatron", path=str(own)) or shutil.which("elastic-megatron")
    if found is None:
        raise UserError(
            "elastic-megatron is not installed beside this Python; write container.bin in the cluster file"
        )
    return Path(found).parent


def _inside(chain: JobChain, job: PlannedJob) -> Iterator[str]:
    """What puts a task into its container, where the task itself does that."""
    cluster, container = chain.cluster, chain.cluster.container
    gpus = cluster.gpus_per_node > 0 and job.recipe.job != "export"
    if isinstance(container, Apptainer):
        yield "apptainer exec" + (" --nv" if gpus else "")
        yield from (f"--bind={shlex.quote(str(path))}" for path in container.mounts)
        yield from (shlex.quote(argument) for argument in container.arguments)
        yield shlex.quote(container.image)
    elif isinstance(container, Docker):
        yield 'docker run --rm --network=host --ipc=host --user="$(id -u):$(id -g)"' + (
            " --gpus=all" if gpus else ""
        )
        yield from (f"--volume={shlex.quote(f'{path}:{path}')}" for path in container.mounts)
        # by name: docker takes the values from the task's environment
        yield " ".join(f"--env={name}" for name in (*RANK, *cluster.environment))
        yield from (shlex.quote(argument) for argument in container.arguments)
        yield shlex.quote(container.image)


def _pyxis(container: Pyxis, environment: tuple[str, ...]) -> Iterator[str]:
    """srun's options of the pyxis plug-in."""
    yield f"--container-image={shlex.quote(container.image)}"
    if container.mounts:
        yield "--container-mounts=" + shlex.quote(",".join(f"{path}:{path}" for path in container.mounts))
    yield "--container-mount-home" if container.mount_home else "--no-container-mount-home"
    if environment:
        yield f"--container-env={','.join(environment)}"  # these win over the image's own
    yield from (shlex.quote(argument) for argument in container.arguments)
