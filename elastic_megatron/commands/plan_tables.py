"""A plan as a person reads it: sizes, widths, budgets, layout and memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..report import format as say

if TYPE_CHECKING:
    from .plan import Subject

_METRICS = {
    "active_params": "active params",
    "total_params": "params",
    "memory_bytes": "memory",
    "latency": "latency",
}


def show(subject: Subject, plan: dict[str, Any]) -> None:
    """Print the tables of a plan to stdout."""
    console = Console()
    console.print(_size_table(subject, plan))
    if subject.space is not None:
        console.print(_width_table(subject))
        console.print(_family_line(subject, plan), highlight=False, soft_wrap=True)
    if plan["budgets"]:
        console.print(_budget_table(plan))
        for line in _unreachable(plan):
            console.print(f"[yellow]{escape(line)}", highlight=False, soft_wrap=True)
    if plan["memory_per_rank"] is not None:
        console.print(_memory_table(subject, plan))
    for line in _layout_lines(plan["layout"]):
        console.print(line, highlight=False, soft_wrap=True)


def _table(title: str, first: str, headings: list[str]) -> Table:
    table = Table(
        title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    table.caption_justify = "left"
    table.add_column(first, style="bold", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _size_table(subject: Subject, plan: dict[str, Any]) -> Table:
    shape = subject.manifest.shape
    kinds = [f"{len(shape.layers_of(s))} {name}" for s, name in say.LAYER_NAMES.items() if shape.layers_of(s)]
    title = f"{subject.name}: {shape.num_layers} layers ({', '.join(kinds)})"
    headings = ["params", "active", "FLOPs", "BF16", "FP8", "NVFP4", "cache"]
    table = _table(title, "size", headings)
    table.caption = f"FLOPs of one token and cache of one sequence, at {subject.context:,} tokens"
    rows = (
        plan["submodels"] if "full" in plan["submodels"] else {"parent": plan["parent"], **plan["submodels"]}
    )
    for name, cost in rows.items():
        table.add_row(
            escape(name),
            say.count(cost["total_params"]),
            say.count(cost["active_params"]),
            say.count(cost["flops_per_token"]),
            *(say.size(cost["weights_bytes"][f]) for f in ("bf16", "fp8", "nvfp4")),
            say.size(cost["cache_bytes_per_sequence"]),
        )
    return table


def _width_table(subject: Subject) -> Table:
    """The widths of each chosen submodel; before training, the choices that the router has."""
    space = subject.space
    assert space is not None
    names = list(subject.submodels) if subject.trained else []
    table = _table("widths", "axis", [escape(n) for n in names] or ["choices", "lanes"])
    for axis in space.axes:
        title = say.axis_title(axis) + (" (per layer)" if axis in space.per_layer else "")
        if names:
            cells = [say.width(subject.submodels[n].to_dict()[axis]) for n in names]
        else:
            cells = [", ".join(map(str, sorted(space.choices_of(axis)))), str(space.lanes_of(axis))]
        table.add_row(title, *cells)
    return table


def _family_line(subject: Subject, plan: dict[str, Any]) -> str:
    family = plan["family_bytes"]
    which = "all of them" if subject.trained else "full and smallest"
    return (
        f"one nested checkpoint: {say.size(family['bf16'])} in BF16; as separate files, {which} would take "
        f"{say.size(family['separate']['bf16'])}\n"
    )


def _budget_table(plan: dict[str, Any]) -> Table:
    table = _table("budgets", "budget", ["metric", "target", "of full", "range of the family", ""])
    for name, b in plan["budgets"].items():
        table.add_row(
            escape(name),
            _METRICS[b["metric"]],
            _amount(b, "absolute"),
            say.percent(b["absolute"] / b["full"], 1),
            f"{_amount(b, 'smallest')} to {_amount(b, 'full')}",
            "[green]reachable" if b["reachable"] else "[yellow]out of reach",
        )
    return table


def _amount(budget: dict[str, Any], key: str) -> str:
    value = budget[key]
    if budget["metric"] == "latency":
        return f"{say.significant(value * 1e3)} ms"
    return say.size(value) if budget["metric"] == "memory_bytes" else say.count(value)


def _unreachable(plan: dict[str, Any]) -> list[str]:
    out = []
    for name, b in plan["budgets"].items():
        if b["absolute"] < b["smallest"]:
            out.append(
                f"budget {name} asks for less than the smallest submodel has; add smaller space.choices"
            )
        elif b["absolute"] > b["full"]:
            out.append(f"budget {name} asks for more than the whole parent has; lower budgets.{name}.target")
    return out


def _memory_table(subject: Subject, plan: dict[str, Any]) -> Table:
    load, parallel, memory = subject.load, subject.parallel, plan["memory_per_rank"]
    ranks = f"{parallel.world_size:,} ranks" if parallel.world_size else "each rank"
    title = f"memory per rank, estimated: {load.name}, {load.micro_batch_size} x {load.seq_length:,} tokens"
    parts = [part for part in memory if part != "total" and memory[part]]
    table = _table(title, "", [*parts, "total"])
    table.add_row(ranks, *(say.size(memory[part]) for part in [*parts, "total"]))
    return table


def _layout_lines(layout: dict[str, Any]) -> Iterator[str]:
    if layout["ok"]:
        yield "[green]layout fits the model and every submodel"
    else:
        yield "[red]layout does not fit:"
        yield from (f"[red]- {escape(problem)}" for problem in layout["problems"])
    for name in ("dense", "expert"):
        if layout[name]:
            sizes = (f"{group} {'?' if n is None else f'{n:,}'}" for group, n in layout[name].items())
            yield f"- ranks of {name} parameters: {' x '.join(sizes)}"
    if len(layout["layers_per_stage"]) > 1:
        stages = (" + ".join(map(str, chunks)) for chunks in layout["layers_per_stage"])
        yield f"- layers per pipeline stage: {', '.join(stages)}"
