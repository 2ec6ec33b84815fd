"""The family at a glance: title, nested squares, the table of sizes, what each size keeps, storage."""

from collections.abc import Sequence
from typing import Any

from elastic_megatron.report import format as say
from elastic_megatron.report import svg
from elastic_megatron.report.format import finite
from elastic_megatron.report.markup import Palette, bar, escape, figure, grid, named, section
from elastic_megatron.report.quantized import Quantized
from elastic_megatron.report.read import Json, RunData
from elastic_megatron.space import SubmodelSpec, apart

FORMATS = {"bf16": "BF16", "fp8": "FP8", "nvfp4": "NVFP4"}
WIDEST_PAIR = 4
"""Up to this many sizes, the table of widths fits half the page."""


def header(run: RunData, palette: Palette) -> str:
    """Title, summary sentence, headline figures and the nested-squares picture."""
    tiles = "".join(
        f"<div><dt>{escape(words)}</dt><dd>{escape(value)}</dd></div>" for words, value in _headlines(run)
    )
    figures = f'<dl class="tiles">{tiles}</dl>' if tiles else ""
    return (
        f'<header id="summary"><div><p class="kicker">elastic_megatron run report</p>'
        f'<h1>{escape(run.title)}</h1><p class="summary">{escape(summary(run))}</p>{figures}</div>'
        f"{_nested_squares(run, palette)}</header>"
    )


def summary(run: RunData) -> str:
    """One or two plain sentences that hold even when parts of the report are missing."""
    members, parent = run.submodels, run.parent
    if not members and run.quantized is not None:
        return _quantized_summary(run.quantized)
    if not members:
        steps = run.steps[-1]["step"] if run.steps else 0
        return f"A run of {steps} steps, so far without a finished family." if steps else "A ranked model."
    size = (
        f"a {say.count(parent['total_params'])}-parameter parent"
        if parent.get("total_params")
        else "the parent"
    )
    loose = _apart(run)
    kind = "sizes" if loose else "nested sizes"
    told = f"One training run turned {size} into {len(members)} {kind} that share one checkpoint."
    name, smallest = list(members.items())[-1]
    active, whole = smallest.get("active_params"), parent.get("active_params")
    if active and whole:
        told += f" The smallest, {name}, uses {say.percent(active / whole)} of the active parameters"
        final = smallest.get("loss_trained")
        if finite(final) and finite(parent.get("loss")):
            gap = final - parent["loss"]
            side = "above" if gap >= 0 else "below"
            told += f" and ends {abs(gap):.3f} {run.loss_unit} {side} the parent"
        told += "."
    return told + "".join(f" {line[0].upper()}{line[1:]}." for line in loose)


def _apart(run: RunData) -> list[str]:
    """Which sizes are not part of which, as far as the report states widths."""
    known = {name: m["widths"] for name, m in run.submodels.items() if m.get("widths")}
    return apart({name: SubmodelSpec.of(widths) for name, widths in known.items()})


def _quantized_summary(found: Quantized) -> str:
    known = found.facts()["submodels"]
    whose = f"{len(known)} nested sizes that share one checkpoint" if len(known) > 1 else "one model"
    told = f"{found.format.upper() if found.format else 'Calibration'} for {whose}."
    won_back = [m["kl_recovered"] for m in known.values() if finite(m["kl_recovered"])]
    if won_back and min(won_back) > 0:
        told += (
            f" Distillation won back {say.percent(min(won_back))} or more of the KL that quantisation cost."
        )
    return told


def _headlines(run: RunData) -> list[tuple[str, str]]:
    tiles = []
    if run.submodels:
        tiles.append(("sizes in one checkpoint", str(len(run.submodels))))
    tokens = (run.report.get("data") or {}).get("train_tokens")
    if tokens is None and run.steps:
        tokens = run.steps[-1].get("tokens")
    if finite(tokens):
        tiles.append(("training tokens", say.count(tokens)))
    seconds = sum(phase.get("seconds") or 0 for phase in run.report.get("phases") or [])
    if seconds:
        tiles.append(("start to finish", say.duration(seconds)))
    closed = [m["gap_closed"] for m in run.submodels.values() if finite(m.get("gap_closed"))]
    if closed:
        tiles.append(("loss gap closed, best size", say.percent(max(closed))))
    return tiles


def _nested_squares(run: RunData, palette: Palette) -> str:
    """Squares whose areas are active parameters, one inside the other; the summary says where weights are not."""
    members = [(name, m["active_params"]) for name, m in run.submodels.items() if m.get("active_params")]
    if not members:
        return ""
    side, edge = 232.0, 8.0
    largest = max(run.parent.get("active_params") or 0, *(active for _, active in members))
    squares, names = [], []
    lengths = [side * (active / largest) ** 0.5 for _, active in members]
    for (name, active), length, inner in zip(members, lengths, [*lengths[1:], 0.0], strict=True):
        top = edge + side - length
        shape = {"x": edge, "y": top, "width": length, "height": length, "rx": 10}
        tip = f"{name}: {say.count(active)} active parameters"
        squares.append(svg.element("rect", **shape, class_=f"nest {palette.colour(name)}", data_tip=tip))
        if length - inner >= 22 and length > 9 * len(name) + 16:
            names.append(svg.text(name, edge + length - 10, top + 18, class_="nest-name end"))
    told = "Squares by active parameters: " + ", ".join(
        f"{name} {say.count(active)}" for name, active in members
    )
    return svg.picture([*squares, *names], 248, 248, told, class_="nested")


def family(run: RunData, palette: Palette) -> str | None:
    """The family table."""
    if not run.submodels:
        return None
    columns = [
        ("size", "Size"),
        ("total", "Parameters"),
        ("active", "Active"),
        ("part", "Active, of parent"),
        ("unsorted", "Unsorted slice"),
        ("sorted", "Sorted slice"),
        ("trained", "Trained"),
        ("gap", "Gap closed"),
        ("cost", "Cost: target → realised"),
    ]
    whole = run.parent.get("active_params")
    rows = [_member_cells(name, m, whole, palette) for name, m in run.submodels.items()]
    if run.parent:
        rows.insert(0, _parent_cells(run.parent))
    shown = [(key, title) for key, title in columns if any(row.get(key) for row in rows)]
    lead = (
        f"Losses are in {run.loss_unit}; lower is better. A slice is what one gets by cutting the parent "
        "down without any training: first in the original order of its weights, then after sorting them by "
        "importance. Training closes the gap that is left to the parent."
    )
    return section("family", "The family", lead, table(shown, rows, "family"))


def _member_cells(name: str, m: Json, whole: float | None, palette: Palette) -> dict[str, str]:
    active = m.get("active_params")
    cells = {"size": f"<b>{named(name, palette)}</b>", "total": _number(m.get("total_params"), say.count)}
    cells["active"] = _number(active, say.count)
    if active and whole:
        part = active / whole
        cells["part"] = f"<span>{say.percent(part)}</span>{bar(part, palette.colour(name))}"
    for key in ("unsorted", "sorted"):
        cells[key] = _number(m.get(f"loss_{key}_slice"), say.loss)
    trained = _number(m.get("loss_trained"), say.loss)
    cells["trained"] = trained and f"<b>{trained}</b>"
    closed = m.get("gap_closed")
    if finite(closed):
        cells["gap"] = (
            f"<span>{say.percent(closed)}</span>{bar(min(max(closed, 0), 1), palette.colour(name))}"
        )
    cells["cost"] = _cost_cell(m)
    return cells


def _parent_cells(parent: Json) -> dict[str, str]:
    trained = _number(parent.get("loss"), say.loss)
    return {
        "size": "parent",
        "total": _number(parent.get("total_params"), say.count),
        "active": _number(parent.get("active_params"), say.count),
        "part": f"<span>100 %</span>{bar(1, 'parent')}" if parent.get("active_params") else "",
        "trained": trained and f"<b>{trained}</b>",
    }


def cost(value: float) -> str:
    """A cost as the recipe states it: a ratio of the parent (at most 1.5) or an amount."""
    return say.percent(value, 1) if value <= 1.5 else say.count(value)


def _cost_cell(m: Json) -> str:
    target, realised, error = m.get("target_cost"), m.get("realised_cost"), m.get("cost_error")
    if not (finite(target) and finite(realised)):
        return ""
    off = f" <small>({error:+.1%})</small>".replace("%", " %") if finite(error) else ""
    return f"<span>{cost(target)} → {cost(realised)}{off}</span>"


def _number(value: Any, show: Any) -> str:
    return show(value) if finite(value) else ""


def table(columns: Sequence[tuple[str, str]], rows: Sequence[dict[str, str]], kind: str) -> str:
    """Rows of markup by column key; the first column heads its row. On a phone each row becomes a card.

    The roles repeat what the tags say because cards are ``display: block``, which would hide the table
    from screen readers.
    """
    head = "".join(f'<th role="columnheader" scope="col">{escape(title)}</th>' for _, title in columns)
    lines = []
    for row in rows:
        first, *rest = columns
        cells = [f'<th role="rowheader" scope="row">{row[first[0]]}</th>']
        for key, title in rest:
            cell, style = (row[key], "") if row.get(key) else ("–", ' class="none"')
            cells.append(f'<td role="cell" data-label="{escape(title)}"{style}>{cell}</td>')
        lines.append(f'<tr role="row">{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table role="table" class="{kind}">'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(lines)}</tbody></table></div>'
    )


def widths(run: RunData, palette: Palette) -> str | None:
    """What each size keeps of every axis, and what its weights weigh in each format."""
    cards = [_width_table(run, palette), _storage(run, palette)]
    found = [card for card in cards if card]
    if not found:
        return None
    lead = "Every size is the leading part of the next larger one, so the family is stored once."
    kind = "pair loose" if len(run.submodels) <= WIDEST_PAIR else "stack"
    return section("widths", "What each size keeps", lead, grid(*found, kind=kind))


def full_width(run: RunData, axis: str) -> float:
    """The parent's width of an axis, or the widest choice if the report does not state it."""
    stated = run.parent.get(axis)
    if finite(stated):
        return float(stated)
    return max(
        say.mean_width(m["widths"][axis]) for m in run.submodels.values() if axis in (m.get("widths") or {})
    )


def _width_table(run: RunData, palette: Palette) -> str:
    members = {name: m["widths"] for name, m in run.submodels.items() if m.get("widths")}
    axes = [axis for axis in say.AXIS_TITLES if any(axis in w for w in members.values())]
    axes += sorted({axis for w in members.values() for axis in w} - set(axes))
    if not axes:
        return ""
    columns = [("axis", "Axis"), *((name, name) for name in members)]
    rows = []
    for axis in axes:
        row = {"axis": escape(say.axis_title(axis))}
        for name, chosen in members.items():
            if axis in chosen:
                part = say.mean_width(chosen[axis]) / full_width(run, axis)
                tip = (
                    f' data-tip="{escape(_per_layer(chosen[axis]))}"'
                    if isinstance(chosen[axis], list)
                    else ""
                )
                row[name] = f"<span{tip}>{say.width(chosen[axis])}</span>{bar(part, palette.colour(name))}"
        rows.append(row)
    note = "Bars are relative to the parent. A range means that layers differ."
    return figure("Widths", note, table(columns, rows, "widths"))


def _per_layer(chosen: list[int]) -> str:
    return "layer by layer: " + ", ".join(map(str, chosen))


def _storage(run: RunData, palette: Palette) -> str:
    stored = {name: m["weights_bytes"] for name, m in run.submodels.items() if m.get("weights_bytes")}
    kinds = [kind for kind in FORMATS if any(finite(b.get(kind)) for b in stored.values())]
    if not kinds:
        return ""
    largest = max(b[kind] for b in stored.values() for kind in kinds if finite(b.get(kind)))
    blocks = []
    for kind in kinds:
        rows = "".join(
            f"<li><span>{named(name, palette)}</span>{bar(b[kind] / largest, palette.colour(name))}"
            f"<span>{say.size(b[kind])}</span></li>"
            for name, b in stored.items()
            if finite(b.get(kind))
        )
        blocks.append(f'<div><h4>{FORMATS[kind]}</h4><ul class="bars">{rows}</ul></div>')
    return figure(
        "Weights on disk", _saving(stored, kinds[0]), f'<div class="formats">{"".join(blocks)}</div>'
    )


def _saving(stored: dict[str, Json], kind: str) -> str:
    sizes = [b[kind] for b in stored.values() if finite(b.get(kind))]
    if len(sizes) < 2:
        return ""
    return (
        f"{len(sizes)} separate {FORMATS[kind]} models would take {say.size(sum(sizes))}; "
        f"nested in one file they take {say.size(max(sizes))}."
    )
