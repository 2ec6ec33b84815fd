"""The `slurm` section of a recipe: what its job asks for. Where it runs is the cluster file's business."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from elastic_megatron.recipe.types import Duration, FilePath, Positive, Problem, Section, raise_any

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
}


def _flag(value: object) -> object:
    """A flag's value: text, a number, or true for a flag without one (false leaves out an inherited flag)."""
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, str) and value.isprintable():
        return str(value)
    raise ValueError("must be text on one line, a number, or true for a flag without a value")


def _not_ours(flags: dict[str, Any]) -> dict[str, Any]:
    def problems() -> Iterator[Problem]:
        for name in flags:
            if not name.replace("-", "").isalnum() or name.startswith("-"):
                yield Problem(
                    (name,), f"{name!r} is no flag; write it without dashes in front, such as exclusive"
                )
            elif name in _OURS:
                yield Problem((name,), f"--{name} is decided elsewhere: by {_OURS[name]}")

    raise_any(problems())
    return flags


_Flag = Annotated[Any, BeforeValidator(_flag), WithJsonSchema({"type": ["string", "number", "boolean"]})]
SbatchFlags = Annotated[dict[str, _Flag], AfterValidator(_not_ours)]


class _Restarting(Section):
    discriminator: ClassVar[str] = "kind"

    lead: Positive = Field(
        default=300,
        description="Seconds before the time limit at which training is told to save: the longest save, and a minute.",
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


Continuation = Annotated[Requeue | Links | Once, Field(discriminator="kind")]


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
