"""The cluster file: how jobs run on one machine, for every recipe. An experiment never repeats it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from elastic_megatron.recipe.gpus import GPUS, Gpu
from elastic_megatron.recipe.slurm import SbatchFlags
from elastic_megatron.recipe.types import (
    Count,
    Duration,
    EnvText,
    FilePath,
    Name,
    Positive,
    PositiveFloat,
    Problem,
    Section,
    Switch,
    absolute,
    default_tag,
    expanded,
    one_line,
    raise_any,
)


class OtherGpu(Section):
    """A GPU that is not in the table."""

    name: Name = Field(description="For messages.")
    memory_gib: PositiveFloat = Field(description="Usable memory, GiB.")
    bf16_tflops: PositiveFloat = Field(description="Peak dense BF16 rate, 1e12 operations a second.")


class MeasuredStep(Section):
    """An optimiser step that was timed on this cluster."""

    flops: PositiveFloat = Field(description="Operations of the step: `flops / steps` of `plan --json`.")
    gpus: Positive = Field(description="GPUs that it ran on.")
    seconds: PositiveFloat = Field(description="How long it took: step_ms of metrics.jsonl / 1000.")

    @property
    def tflops(self) -> float:
        """1e12 operations a second and GPU."""
        return self.flops / self.gpus / self.seconds / 1e12


def _gpu_kind(value: object) -> str:
    return "sizes" if isinstance(value, dict | OtherGpu) else "name"


GpuName = Literal["a100-40gb", "a100-80gb", "h100-80gb", "h200", "b200", "gb200", "l40s"]
GpuChoice = Annotated[
    Annotated[GpuName, Tag("name")] | Annotated[OtherGpu, Tag("sizes")], Discriminator(_gpu_kind)
]


def _image(value: object) -> object:
    """A file by its absolute path; a reference of a registry as it is."""
    if isinstance(value, str) and value.startswith(("/", "./", "../", "~")):
        return str(absolute(value))
    return expanded(value)


def _mount(path: Path) -> Path:
    if re.search(r"[,:]", str(path)):
        raise ValueError(f"{str(path)!r} cannot be mounted: runtimes take , and : for separators")
    return path


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        shown = repr(name.partition("=")[0])  # what follows may be a secret
        raise ValueError(f"{shown} is given a value, or is no name; only names of variables are written here")
    return name


Variable = Annotated[str, AfterValidator(_variable)]
ShellLine = Annotated[str, AfterValidator(one_line)]
Image = Annotated[str, BeforeValidator(_image), Field(min_length=1)]
Mount = Annotated[FilePath, AfterValidator(_mount)]


class NoContainer(Section):
    """Jobs run on the node itself."""

    discriminator: ClassVar[str] = "runtime"

    runtime: Literal["none"] = Field(default="none", description="No container.")
    bin: FilePath | None = Field(
        default=None, description="Folder of elastic-megatron; default: the one that submits."
    )


class _Container(Section):
    discriminator: ClassVar[str] = "runtime"

    image: Image = Field(description="Image: a registry reference, or a file (.sqsh, .sif).")
    mounts: tuple[Mount, ...] = Field(
        description="Folders to see inside, at the same paths: recipes, data, checkpoints, run folders."
    )
    arguments: tuple[ShellLine, ...] = Field(
        default=(), description="Further arguments of the runtime (of srun, for pyxis), one an item."
    )


class Pyxis(_Container):
    """NVIDIA's plug-in: srun starts tasks in a container."""

    runtime: Literal["pyxis"] = Field(description="pyxis and enroot.")
    mount_home: Switch = Field(default=False, description="See the home folder inside.")


class Apptainer(_Container):
    """`apptainer exec`, by every task."""

    runtime: Literal["apptainer"] = Field(description="apptainer (singularity).")


class Docker(_Container):
    """`docker run`, by every task."""

    runtime: Literal["docker"] = Field(description="docker; needs its daemon on every node.")


ContainerChoice = Annotated[
    NoContainer | Pyxis | Apptainer | Docker, Field(discriminator="runtime"), default_tag("runtime", "none")
]


class ExportJobs(Section):
    """What is different for jobs that export: they convert files on the CPU of one node."""

    account: EnvText | None = Field(default=None, description="Account; default: that of all jobs.")
    partition: EnvText | None = Field(
        default=None, description="Partition, such as one without GPUs; default: that of all jobs."
    )
    qos: EnvText | None = Field(default=None, description="Quality of service; default: that of all jobs.")
    sbatch: SbatchFlags = Field(
        default={},
        description="Further flags of sbatch, which win over those of all jobs: {exclusive: false, cpus-per-task: 8}.",
    )


class Cluster(Section):
    """How jobs run on one cluster."""

    account: EnvText | None = Field(default=None, description="Account that is charged.")
    partition: EnvText | None = Field(
        default=None, description="Partition; default: the cluster's own default."
    )
    qos: EnvText | None = Field(default=None, description="Quality of service.")
    time: Duration = Field(default="4:00:00", description="Time limit of jobs that name none.")
    max_time: Duration | None = Field(
        default=None, description="Longest time limit that the partition allows."
    )
    max_nodes: Positive | None = Field(default=None, description="Nodes of the largest job.")
    gpus_per_node: Count = Field(
        default=0, description="GPUs of a node; 0: jobs ask for none and run on the CPU."
    )
    request_gpus: Switch = Field(
        default=True,
        description="Ask Slurm for GPUs; false where nodes are given whole, and GPUs are no resource.",
    )
    gpu: GpuChoice | None = Field(
        default=None,
        description="The GPU: a known name, or its sizes. Memory and time are estimated with it.",
    )
    utilization: Annotated[PositiveFloat, Field(le=1)] | None = Field(
        default=None,
        description="Share of the peak rate that training is assumed to reach in estimates of time; default: a range, "
        "from what has been published of MoE models.",
    )
    measured_step: MeasuredStep | None = Field(
        default=None,
        description="A step that was timed here, in place of utilization: estimates are by its rate.",
    )
    container: ContainerChoice = Field(default=NoContainer(), description="What a task runs in.")
    environment: tuple[Variable, ...] = Field(
        default=(),
        description="Names of variables that jobs need, such as HF_TOKEN: they must be set where jobs are submitted, "
        "and containers take them over.",
    )
    setup: tuple[ShellLine, ...] = Field(
        default=(),
        description="Shell lines before a job starts its tasks: module load, export NCCL_DEBUG=WARN.",
    )
    launcher: Literal["srun", "torchrun"] = Field(
        default="srun", description="srun: one task a rank; torchrun: one task a node that starts its ranks."
    )
    log_dir: FilePath | None = Field(
        default=None, description="Folder for logs; default: in the run folder, which then links to it."
    )
    template: FilePath | None = Field(
        default=None, description="Job script to fill in; default: the built-in one."
    )
    sbatch: SbatchFlags = Field(
        default={},
        description="Further flags of sbatch for every job, without dashes: {exclusive: true, mem: 0}.",
    )
    export: ExportJobs = Field(
        default=ExportJobs(), description="Jobs that export, which need no GPU: a partition of CPUs for them."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        raise_any(self._problems())
        return self

    def _problems(self) -> Iterator[Problem]:
        if self.gpu is not None and not self.gpus_per_node:
            yield Problem(("gpu",), "has no effect without gpus_per_node; set it to the GPUs of a node")
        step, card = self.measured_step, self.card
        if step is None:
            return
        if self.utilization is not None:
            yield Problem(("utilization",), "says what measured_step says; keep one of them")
        if card is None:
            yield Problem(("measured_step",), "has no effect without gpu; name the GPU that it ran on")
        elif step.tflops > card.bf16_tflops:
            yield Problem(
                ("measured_step",),
                f"{step.flops:g} operations in {step.seconds:g} s on {step.gpus} GPUs are {step.tflops:.0f} TFLOP/s "
                f"each, above their peak of {card.bf16_tflops:g}; correct one of the three",
            )

    @property
    def card(self) -> Gpu | None:
        """Memory and rate of the GPU, where it is named."""
        if isinstance(self.gpu, OtherGpu):
            return Gpu(self.gpu.memory_gib, self.gpu.bf16_tflops)
        return GPUS[self.gpu] if self.gpu is not None else None
