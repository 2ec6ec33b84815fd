"""What the budget router chose: its probabilities over time, per layer where they differ, and its costs."""

from collections.abc import Sequence

from elastic_megatron.report import format as say
from elastic_megatron.report import svg
from elastic_megatron.report.charts import Line, LineChart
from elastic_megatron.report.format import finite
from elastic_megatron.report.markup import Palette, escape, figure, grid, legend, named, section
from elastic_megatron.report.read import Json, RunData
from elastic_megatron.report.svg import Scale

COLUMNS = 72
ROW, LEFT, WIDTH = 22, 46, 300


def router(run: RunData, palette: Palette) -> str | None:
    """One card per axis with a heat map per budget, then the cost of every budget over time."""
    lines = [line for line in run.routers if line.get("budgets")]
    if not lines:
        return None
    last = lines[-1]
    names = [name for name in palette.names if name in last["budgets"]]
    axes = list(dict.fromkeys(axis for name in names for axis in last["budgets"][name].get("probs") or {}))
    cards = [_axis_card(lines, axis, names, palette) for axis in axes]
    lead = (
        "For every budget the router learns how wide each part of the model should be. Stronger colour "
        f"means more probable; each column is a moment of the run. {_settled(lines)}"
    )
    closing = [
        card for card in (_cost_card(lines, names, palette), _certainty_card(lines, names, palette)) if card
    ]
    return section("router", "Router choices", lead, *cards, grid(*closing) if closing else "")


def mean_probabilities(probs: Sequence) -> list[float]:
    """Probability per choice; where layers choose separately, the mean over layers."""
    if probs and isinstance(probs[0], list | tuple):
        return [sum(layer[i] for layer in probs) / len(probs) for i in range(len(probs[0]))]
    return list(probs)


def certainty(probs: Sequence) -> float:
    """Probability of the most probable choice; where layers choose separately, its mean over layers."""
    if probs and isinstance(probs[0], list | tuple):
        return sum(max(layer) for layer in probs) / len(probs)
    return max(probs)


def choice_labels(line: Json, axis: str, n: int) -> list[str]:
    """The n widths of an axis in words, numbered where a line does not state them."""
    choices = (line.get("choices") or {}).get(axis)
    return [str(c) for c in choices] if choices and len(choices) == n else [f"#{i + 1}" for i in range(n)]


def _settled(lines: list[Json]) -> str:
    """When the most probable choices stopped changing, in words."""

    def chosen(line: Json) -> dict[str, object]:
        return {name: b.get("widths") for name, b in line["budgets"].items()}

    changed = [i for i in range(1, len(lines)) if chosen(lines[i]) != chosen(lines[i - 1])]
    if not changed:
        return "The most probable choices never changed."
    last = lines[-1]["step"]
    return f"The most probable choices last changed at step {lines[changed[-1]]['step']} of {last}."


def _axis_card(lines: list[Json], axis: str, names: list[str], palette: Palette) -> str:
    cells = []
    for name in names:
        history = [line for line in lines if axis in ((line["budgets"].get(name) or {}).get("probs") or {})]
        if not history:
            continue
        probs = history[-1]["budgets"][name]["probs"][axis]
        # a run that was continued with other choices: the last ones are shown
        count = len(mean_probabilities(probs))
        history = [
            line for line in history if len(mean_probabilities(line["budgets"][name]["probs"][axis])) == count
        ]
        chosen = (history[-1]["budgets"][name].get("widths") or {}).get(axis)
        sure = certainty(probs)
        verdict = f"{say.width(chosen)} " if chosen is not None else ""
        head = f"<p>{named(name, palette)}<b>{escape(verdict)}</b><small>{say.percent(sure)}</small></p>"
        maps = _over_time(history, name, axis, palette.colour(name))
        if probs and isinstance(probs[0], list | tuple):
            maps = f"<small>mean over layers</small>{maps}<small>at the end, layer by layer</small>"
            maps += _per_layer(history[-1], name, axis, palette.colour(name))
        cells.append(f'<div class="choice">{head}{maps}</div>')
    return figure(say.axis_title(axis).capitalize(), "", grid(*cells, kind="maps"))


def _over_time(history: list[Json], name: str, axis: str, colour: str) -> str:
    stride = max(1, -(-len(history) // COLUMNS))
    kept = history[::-1][::stride][::-1]
    columns = [mean_probabilities(line["budgets"][name]["probs"][axis]) for line in kept]
    steps = [line["step"] for line in kept]
    labels = choice_labels(history[-1], axis, len(columns[-1]))
    ticks = sorted({0, len(steps) // 2, len(steps) - 1})
    marks = [(i, say.trimmed(say.count(steps[i], 4))) for i in ticks]
    told = f"Probability of each {say.axis_title(axis)} for {name} over the steps"
    best = max(range(len(labels)), key=lambda i: columns[-1][i])
    return _heat(list(zip(*columns, strict=True)), labels, marks, "step", colour, told, best)


def _per_layer(line: Json, name: str, axis: str, colour: str) -> str:
    layers = line["budgets"][name]["probs"][axis]
    labels = choice_labels(line, axis, len(layers[0]))
    marks = [(i, str(i + 1)) for i in sorted({0, len(layers) // 2, len(layers) - 1})]
    told = f"Final probability of each {say.axis_title(axis)} for {name}, layer by layer"
    return _heat(list(zip(*layers, strict=True)), labels, marks, "layer", colour, told, best=None)


def _heat(
    rows: Sequence[Sequence[float]],
    labels: Sequence[str],
    ticks: Sequence[tuple[int, str]],
    x_title: str,
    colour: str,
    told: str,
    best: int | None,
) -> str:
    """Largest choice on top; row ``best`` is set in bold."""
    order = sorted(range(len(rows)), key=lambda i: -float(labels[i]) if labels[i].isdigit() else i)
    n, bottom = len(rows[0]), 4 + ROW * len(rows)
    x = Scale(0, n, LEFT, WIDTH - 4)
    back = svg.element("rect", x=LEFT, y=4, width=WIDTH - 4 - LEFT, height=bottom - 5, class_="cell-back")
    body = [back, *svg.heat_rows([rows[i] for i in order], x, 4, ROW, colour)]
    for place, i in enumerate(order):
        style = "tick y strong" if i == best else "tick y"
        body.append(svg.text(labels[i], LEFT - 6, 4 + ROW * (place + 0.5), class_=style))
    for i, label in ticks:
        side = "tick" if i == 0 else "tick end" if i == n - 1 else "tick x"
        at = x(0) if i == 0 else x(n) if i == n - 1 else x(i + 0.5)
        body.append(svg.text(label if i else f"{x_title} {label}", at, bottom + 14, class_=side))
    return svg.picture(body, WIDTH, bottom + 20, told, class_="heat")


def _cost_card(lines: list[Json], names: list[str], palette: Palette) -> str:
    drawn = []
    for name in names:
        costs = {
            key: [
                (line["step"], line["budgets"][name][key])
                for line in lines
                if finite((line["budgets"].get(name) or {}).get(key))
            ]
            for key in ("cost", "realised")
        }
        if costs["cost"]:
            drawn.append(
                Line(name, palette.colour(name), costs["cost"], costs["realised"], shape=palette.shape(name))
            )
    if not drawn:
        return ""
    budgets = lines[-1]["budgets"]
    targets = [
        (budgets[n]["target"], "", palette.colour(n)) for n in names if finite(budgets[n].get("target"))
    ]
    chart = LineChart(
        "cost",
        "Cost of every budget, relative to the parent",
        drawn,
        "step",
        "cost, of parent",
        say.percent,
        levels=targets,
        fit_faint=True,
    )
    taus = [line["tau"] for line in lines if finite(line.get("tau"))]
    cooled = f" The sampling temperature went from {taus[0]:.2f} to {taus[-1]:.2f}." if len(taus) > 1 else ""
    note = (
        "Thick: expected cost of the probabilities. Thin: cost of the most probable choices. Dashed: target."
    )
    return figure("Cost against target", note + cooled, legend(names, palette), chart.draw())


def _certainty_card(lines: list[Json], names: list[str], palette: Palette) -> str:
    drawn = []
    for name in names:
        points = []
        for line in lines:
            probs = [p for p in ((line["budgets"].get(name) or {}).get("probs") or {}).values() if p]
            if probs:
                points.append((line["step"], sum(map(certainty, probs)) / len(probs)))
        if points:
            drawn.append(Line(name, palette.colour(name), points, shape=palette.shape(name)))
    if not drawn:
        return ""
    chart = LineChart("certainty", "How sure the router is", drawn, "step", "probability", say.percent)
    note = "Probability of the most probable choice, averaged over axes and layers. 100 % is fully decided."
    return figure("How sure the router is", note, legend(names, palette), chart.draw())
