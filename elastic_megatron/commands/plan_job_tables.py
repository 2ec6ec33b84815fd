"""The jobs of a plan as a person reads them: work, time, disk and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..preflight.work import utilizations
from ..recipe.cluster import Cluster
from ..report import format as say
from .plan_format import empty_table, in_bytes

_PARTS = ("weights", "gradients", "optimizer", "teacher", "rounded", "activations", "logits", "total")


def show_jobs(console: Console, cluster: Cluster, jobs: dict[str, dict[str, Any]]) -> None:
    """Print what every job takes, and the memory of its fullest rank."""
    console.print(_work_table(cluster, jobs))
    if any(job["memory_per_rank"] for job in jobs.values()):
        console.print(_memory_table(cluster, jobs))
    for name, job in jobs.items():
        for problem in job["problems"] if len(jobs) > 1 else ():
            console.print(f"[red]- {escape(f'{name}: {problem}')}", highlight=False, soft_wrap=True)


def _work_table(cluster: Cluster, jobs: dict[str, dict[str, Any]]) -> Table:
    timed = any(job["gpu_hours"] is not None for job in jobs.values())
    headings = [
        "ranks",
        "steps",
        "tokens",
        "FLOPs",
        *(["GPU-h", "time", "jobs"] if timed else []),
        "disk",
    ]
    table = empty_table("jobs", "job", headings)
    table.caption = (
        "FLOPs: 3 forward passes of the whole student (4 with recomputation) and 1 of the teacher, and to quantise 1 "
        "for each submodel; disk: what is there at a time"
    )
    if timed:
        assert cluster.card is not None
        table.caption += (
            f"; GPU-h: hours of a GPU at {_utilization(cluster)} of {cluster.card.bf16_tflops:g} TFLOP/s (BF16, "
            f"{_gpu(cluster)}); jobs: time limits that this takes at most"
        )
    for name, job in jobs.items():
        time = (
            [_range(job["gpu_hours"], _hours), _range(job["hours"], _duration), _number(job["slurm_jobs"])]
            if timed
            else []
        )
        numbers = [_number(job["ranks"]), _number(job["steps"]), _count(job["tokens"]), _count(job["flops"])]
        table.add_row(escape(name), *numbers, *time, in_bytes(job["disk_bytes"]))
    return table


def _memory_table(cluster: Cluster, jobs: dict[str, dict[str, Any]]) -> Table:
    shown = {name: job["memory_per_rank"] for name, job in jobs.items() if job["memory_per_rank"]}
    table = empty_table("memory per rank", "", [escape(name) for name in shown])
    for part in _PARTS:
        if any(memory[part] for memory in shown.values()):
            table.add_row(
                part, *(in_bytes(memory[part]) if memory[part] else "" for memory in shown.values())
            )
    if cluster.card is not None:
        limit = cluster.card.memory_gib * 2**30
        shares = [say.percent(memory["total"] / limit) for memory in shown.values()]
        table.add_row(f"of {_gpu(cluster)}", *shares)
    table.caption = "estimated, without fragmentation and buffers"
    return table


def _gpu(cluster: Cluster) -> str:
    return cluster.gpu if isinstance(cluster.gpu, str) else getattr(cluster.gpu, "name", "the GPU")


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}" if value else ""


def _count(value: float) -> str:
    if value >= 1e15:
        return f"{value:.1e}".replace("e+", "e")
    return say.count(value) if value else ""


def _utilization(cluster: Cluster) -> str:
    least, most = utilizations(cluster)
    if cluster.measured_step is not None:
        return f"{say.percent(least)}, as measured,"
    return (
        say.percent(least)
        if least == most
        else f"{say.percent(most)} (below: {say.percent(least)}), as published,"
    )


def _range(values: Sequence[float] | None, shown: Callable[[float], str]) -> str:
    """The fewest, and below them the most; once where they read alike."""
    return "?" if values is None else "\n".join(dict.fromkeys(map(shown, values)))


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else say.significant(value, 2) if value else ""


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.0f} min" if hours else ""
