"""A plan as a person reads it: sizes, widths, budgets, layout and memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..report import format as say
from .plan_format import empty_table, in_bytes, tokens

if TYPE_CHECKING:
    from .plan import Subject

_KINDS = {
    "attention": "attention", "mamba": "Mamba", "mlp": "FFN", "experts": "experts", "shared_experts": "shared experts",
}  # fmt: skip
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
    if subject.quantised is not None:
        console.print(_left_alone_line(subject, plan), highlight=False, soft_wrap=True)
    if subject.unread is not None:
        console.print(f"[yellow]{escape(subject.unread)}", highlight=False, soft_wrap=True)
    console.print(_cache_table(subject, plan))
    if subject.space is not None:
        console.print(_width_table(subject))
        console.print(_family_line(subject, plan), highlight=False, soft_wrap=True)
    if plan["budgets"]:
        console.print(_budget_table(plan))
        for line in _unreachable(plan):
            console.print(f"[yellow]{escape(line)}", highlight=False, soft_wrap=True)
    if subject.jobs is not None:
        from .plan_job_tables import show_jobs

        show_jobs(console, subject.jobs[0].cluster, plan["jobs"])
    if plan["memory_per_rank"] and not any(job["memory_per_rank"] for job in plan["jobs"].values()):
        console.print(_memory_table(subject, plan))
    for line in _layout_lines(plan["layout"]):
        console.print(line, highlight=False, soft_wrap=True)
    for line in plan["serving"]:
        console.print(f"[yellow]- {escape(line)}", highlight=False, soft_wrap=True)


def _size_table(subject: Subject, plan: dict[str, Any]) -> Table:
    shape, parent = subject.manifest.shape, plan["parent"]
    kinds = [f"{len(shape.layers_of(s))} {name}" for s, name in say.LAYER_NAMES.items() if shape.layers_of(s)]
    title = f"{subject.name}: {shape.num_layers} layers ({', '.join(kinds)})"
    formats = ("bf16", "fp8", "nvfp4") if subject.quantised is None else ("bf16",)
    stored = [] if subject.quantised is None else ["stored"]
    columns = ["params", "active", "GFLOPs", *(name.upper() for name in formats), *stored]
    table = empty_table(title, "size", columns)
    table.caption = (
        f"{parent['total_params']:,} parameters, {parent['active_params']:,} active; GFLOPs of one token in a "
        f"sequence of {subject.context:,}"
    )
    for name, cost in _rows(plan).items():
        table.add_row(
            escape(name),
            say.count(cost["total_params"]),
            say.count(cost["active_params"]),
            say.significant(cost["flops_per_token"] / 1e9),
            *(in_bytes(cost["weights_bytes"][f]) for f in formats),
            *(in_bytes(cost["stored_bytes"]) for _ in stored),
        )
    if subject.quantised is not None:
        table.caption += f"; stored: {subject.quantised.format.algo} but for what is left alone"
    return table


def _rows(plan: dict[str, Any]) -> dict[str, Any]:
    """The sizes of a family; the parent by its own name where none of them is the whole."""
    return (
        plan["submodels"] if "full" in plan["submodels"] else {"parent": plan["parent"], **plan["submodels"]}
    )


def _cache_table(subject: Subject, plan: dict[str, Any]) -> Table:
    table = empty_table("KV cache and SSM state", "size", [tokens(n) for n in subject.contexts])
    table.caption = "of one sequence, by its tokens"
    for name, cost in _rows(plan).items():
        table.add_row(escape(name), *(in_bytes(cost["cache_bytes"][str(n)]) for n in subject.contexts))
    return table


def _width_table(subject: Subject) -> Table:
    """The widths of each chosen submodel; before training, the choices that the router has."""
    space = subject.space
    assert space is not None
    names = list(subject.submodels) if subject.trained else []
    table = empty_table("widths", "axis", [escape(n) for n in names] or ["choices", "lanes"])
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
    lines = [
        f"one nested checkpoint: {in_bytes(family['bf16'])} in BF16; as separate files, {which} would take "
        f"{in_bytes(family['separate']['bf16'])}"
    ]
    if subject.quantised is not None:
        lines.append(
            f"quantised to {subject.quantised.format.algo}: {in_bytes(family['stored'])}; as separate files, {which} "
            f"would take {in_bytes(family['separate']['stored'])}"
        )
    return "\n".join([*lines, ""])


def _left_alone_line(subject: Subject, plan: dict[str, Any]) -> str:
    """What is not quantised: layers by their numbers, counted from 0, and what never is."""
    found, shape = plan["left_alone"], subject.manifest.shape
    parts = [f"{title} {', '.join(map(str, found[kind]))}" for kind, title in _KINDS.items() if kind in found]
    parts += ["embeddings", "lm_head", "norms", *(["convolutions"] if shape.layers_of("M") else [])]
    return f"BF16: {'; '.join(parts)}{'; FP32: moe_router' if shape.layers_of('E') else ''}\n"


def _budget_table(plan: dict[str, Any]) -> Table:
    table = empty_table("budgets", "budget", ["metric", "target", "of full", "range of the family", ""])
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
    return in_bytes(value) if budget["metric"] == "memory_bytes" else say.count(value)


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
    load, memory = subject.load, plan["memory_per_rank"]
    title = f"memory per rank, estimated: {subject.load_name}, {load.micro_batch_size} x {load.seq_length:,} tokens"
    table = empty_table(title, "", [part for part in memory if memory[part]])
    table.add_row("each rank", *(in_bytes(size) for size in memory.values() if size))
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
