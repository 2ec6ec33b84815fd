"""The `slurm` section of a recipe: what its job asks for. Where it runs is the cluster file's business."""

import difflib
import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from elastic_megatron.recipe.types import (
    Duration,
    FilePath,
    Positive,
    Section,
    default_tag,
    expand,
    one_line,
    shown_value,
)

# sbatch flag -> what decides it instead
_OURS = {
    "account": "account in the cluster file",
    "partition": "partition in the cluster file",
    "qos": "qos in the cluster file",
    "export": "environment in the cluster file",
    "nodes": "slurm.nodes",
    "ntasks": "slurm.nodes and slurm.ranks_per_node",
    "ntasks-per-node": "slurm.ranks_per_node",
    "gpus-per-node": "gpus_per_node in the cluster file",
    "time": "slurm.time",
    "signal": "slurm.continuation",
    "requeue": "slurm.continuation",
    "no-requeue": "slurm.continuation",
    "dependency": "the chain",
    "kill-on-invalid-dep": "the chain",
    "job-name": "the chain",
    "output": "log_dir in the cluster file",
    "error": "log_dir in the cluster file",
    "open-mode": "log_dir in the cluster file",
    "parsable": "submit",
    "test-only": "submit --dry-run",
    "wrap": "the template",
    "export-file": "environment in the cluster file",
    "tasks-per-node": "slurm.ranks_per_node",
    "gpus": "slurm.nodes and gpus_per_node in the cluster file",
    "gpus-per-task": "gpus_per_node in the cluster file",
    "array": "the chain, a job for each recipe",
    "wait": "status",
}
# The others of sbatch 24.11, to tell typos.
_FLAGS = """
    acctg-freq batch bb bbf begin bell chdir cluster-constraint clusters comment constraint container
    container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline
    delay-boot distribution exclude exclusive extra extra-node-info get-user-env gid gpu-bind gpu-freq
    gpus-per-socket gres gres-flags hint hold ignore-pbs immediate input licenses mail-type mail-user
    mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-bell no-kill nodefile nodelist
    ntasks-per-core ntasks-per-gpu ntasks-per-socket overcommit oversubscribe prefer priority profile
    propagate quiet reboot reservation resv-ports segment sockets-per-node spread-job stepmgr switches
    thread-spec threads-per-core time-min tmp tres-bind tres-per-job tres-per-task uid use-min-nodes
    verbose wait-all-nodes wckey x11
"""


def _value(value: object) -> object:
    """A flag's value: text, a number, or true for a flag without one (false leaves out an inherited flag)."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return one_line(expand(value))
    raise ValueError(f"must be text, a number, or true for a flag without a value, got {shown_value(value)}")


def _flag(name: str) -> str:
    if text := _problem(name):
        raise ValueError(text)
    return name


def _problem(name: str) -> str | None:
    """What is wrong with a flag of this name. Those that nobody knows pass: plug-ins of Slurm add their own."""
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        return f"{name!r} is no flag; write it without dashes in front, such as exclusive"
    if len(name) == 1:
        return f"-{name} is short for a flag; write the long one"
    if decided := _OURS.get(name):
        return f"--{name} is decided elsewhere: by {decided}"
    known = _FLAGS.split()
    near = difflib.get_close_matches(name, [*_OURS, *known], n=1, cutoff=0.85)
    return f"sbatch has no --{name}, did you mean {near[0]!r}?" if near and name not in known else None


Flag = Annotated[str, AfterValidator(_flag)]
FlagValue = Annotated[Any, BeforeValidator(_value), WithJsonSchema({"type": ["string", "number", "boolean"]})]
SbatchFlags = dict[Flag, FlagValue]


class _Restarting(Section):
    discriminator: ClassVar[str] = "kind"

    lead: Positive = Field(
        default=300,
        description="Seconds before the time limit at which a training job is told to save; give it a save and "
        "a minute.",
    )
    max_failures: Positive = Field(
        default=3, description="Failures in a row without a newer checkpoint after which the job gives up."
    )


class Requeue(_Restarting):
    """One job that goes back to the queue."""

    kind: Literal["requeue"] = Field(
        default="requeue",
        description="Save before the time limit, go back to the queue, resume; likewise on failure.",
    )


class Links(_Restarting):
    """Several jobs, queued at once, that run one after another under one name (`--dependency=singleton`)."""

    kind: Literal["chain"] = Field(
        description="Several jobs under one name, each going on where the last saved."
    )
    links: Annotated[Positive, Field(ge=2)] = Field(
        description="Jobs to queue; those not needed end at once."
    )


class Once(Section):
    """A job that runs once."""

    discriminator: ClassVar[str] = "kind"

    kind: Literal["none"] = Field(
        description="Run once; neither the time limit nor a failure starts it again."
    )


Continuation = Annotated[Requeue | Links | Once, Field(discriminator="kind"), default_tag("kind", "requeue")]


class Slurm(Section):
    """What a job asks for."""

    cluster: FilePath | None = Field(
        default=None, description="Cluster file, for a recipe that is submitted alone; a chain names its own."
    )
    nodes: Positive = Field(default=1, description="Nodes.")
    ranks_per_node: Positive | None = Field(
        default=None, description="Processes on a node; default: the cluster's gpus_per_node, or 1."
    )
    time: Duration | None = Field(default=None, description="Time limit; default: the cluster's.")
    continuation: Continuation = Field(
        default=Requeue(), description="What follows the time limit or a failure."
    )
    sbatch: SbatchFlags = Field(
        default={},
        description="Further flags of sbatch for this job, without dashes: {exclusive: true, mem: 0}.",
    )
