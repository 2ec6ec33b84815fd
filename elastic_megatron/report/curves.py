"""How training went: the Pareto plot, evaluation and training losses, and the run's vital signs."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from elastic_megatron.report import format as say
from elastic_megatron.report.charts import Candidate, Line, LineChart, pareto_chart
from elastic_megatron.report.format import finite
from elastic_megatron.report.markup import Palette, figure, grid, legend, section
from elastic_megatron.report.read import Json, RunData, budget_of
from elastic_megatron.report.svg import Point

SMOOTHING = 25
"""The smoothing window is the number of points divided by this."""
_MARKS = 12
"""Steps that are marked or named one by one."""


def pareto(run: RunData, palette: Palette) -> str | None:
    """Active parameters against loss, and the loss of every size over the run."""
    cards = [_pareto_card(run, palette), _eval_card(run, palette)]
    found = [card for card in cards if card]
    if not found:
        return None
    return section("pareto", "Size against quality", _gap_words(run), grid(*found))


def _gap_words(run: RunData) -> str:
    finals = [(n, m["loss_trained"]) for n, m in run.submodels.items() if finite(m.get("loss_trained"))]
    loss = run.parent.get("loss")
    if not finals or not finite(loss):
        return ""
    told = ", ".join(f"{name} {f'{value - loss:+.3f}'.replace('-', '−')}" for name, value in finals)
    return f"Distance to the parent after training, in {run.loss_unit}: {told}."


def _pareto_card(run: RunData, palette: Palette) -> str:
    found = [
        Candidate(
            name,
            palette.colour(name),
            palette.shape(name),
            m["active_params"],
            m["loss_trained"],
            m["loss_sorted_slice"] if finite(m.get("loss_sorted_slice")) else None,
        )
        for name, m in run.submodels.items()
        if finite(m.get("active_params")) and finite(m.get("loss_trained"))
    ]
    if not found:
        return ""
    size, loss = run.parent.get("active_params"), run.parent.get("loss")
    parent = (size, loss) if finite(size) and finite(loss) else None
    others = [
        (name, b["active_params"], b["loss"])
        for name, b in (run.report.get("baselines") or {}).items()
        if isinstance(b, dict) and finite(b.get("active_params")) and finite(b.get("loss"))
    ]
    chart = pareto_chart(found, parent, others, "active parameters", f"loss ({run.loss_unit})", say.loss)
    note = "Hollow: sorted slice before training. Filled: after training. Down and to the left is better."
    return figure("Loss against active parameters", note, chart)


def _eval_card(run: RunData, palette: Palette) -> str:
    at = _x_key(run.evals)
    lines = []
    for name in palette.names:
        points = [
            (line[at], line["submodels"][name]["loss"])
            for line in run.evals
            if finite((line.get("submodels") or {}).get(name, {}).get("loss"))
        ]
        if points:
            lines.append(Line(name, palette.colour(name), points, shape=palette.shape(name)))
    if not lines:
        return ""
    loss = run.parent.get("loss")
    chart = LineChart(
        "eval",
        "Evaluation loss of every size",
        lines,
        _x_title(at),
        f"loss ({run.loss_unit})",
        say.loss,
        levels=[(loss, "", "parent")] if finite(loss) else [],
        events=_stage_changes(run, at),
    )
    keys = legend(
        [line.name for line in lines], palette, [("dashed parent", "parent")] if finite(loss) else []
    )
    return figure(
        "Evaluation loss over the run", "Measured on text held out from training.", keys, chart.draw()
    )


def training(run: RunData, palette: Palette) -> str | None:
    """Training losses by budget, then learning rate and gradient norm."""
    at = _x_key(run.steps)
    base = LineChart("", "", (), _x_title(at), "", say.significant, events=_stage_changes(run, at))
    spikes = [
        (step[at], "spike", "") for step in run.steps if finite(step.get("spike")) and finite(step.get(at))
    ]
    spiked = replace(base, events=[*base.events, *spikes[:_MARKS]])
    cards = [
        _by_budget(run, palette, at, replace(spiked, key="loss", label="Training loss"), "loss"),
        _by_budget(run, palette, at, replace(base, key="kd", label="Distillation loss"), "kd_loss"),
        _one_line(
            run, at, replace(base, key="lr", label="Learning rate", y_title="learning rate", height=220), "lr"
        ),
        _one_line(
            run, at, replace(base, key="norm", label="Gradient norm", y_title="norm", height=220), "grad_norm"
        ),
    ]
    found = [card for card in cards if card]
    if not found:
        return None
    last = run.steps[-1]
    tokens = f" and {say.count(last['tokens'])} tokens" if finite(last.get("tokens")) else ""
    lead = (
        f"{last['step']} steps{tokens}. Thick lines are smoothed, thin lines are single steps.{_trouble(run)}"
    )
    return section("training", "Training", lead, grid(*found))


def _trouble(run: RunData) -> str:
    """Which steps had a loss that stands out or gave no update, and how often the run went back."""
    kinds = {
        "Loss spikes": [step for step in run.steps if finite(step.get("spike"))],
        "Steps without an update": [step for step in run.steps if step.get("updated") is False],
    }
    told = "".join(f" {title}: {_steps(found)}." for title, found in kinds.items() if found)
    back = [str(rewind.get("step")) for rewind in run.rewinds]
    return told + (f" Diverged, and went back to step {', '.join(back)}." if back else "")


def _steps(found: list[Json]) -> str:
    shown = ", ".join(str(step.get("step")) for step in found[:_MARKS])
    return f"{shown} and {len(found) - _MARKS} more" if len(found) > _MARKS else shown


def _by_budget(run: RunData, palette: Palette, at: str, base: LineChart, key: str) -> str:
    parts: dict[str | None, list[Point]] = {}
    for step in run.steps:
        if finite(step.get(key)):
            parts.setdefault(budget_of(step), []).append((step[at], step[key]))
    mixed = parts.pop(None, [])
    lines = [
        Line(name, palette.colour(name), smooth(parts[name]), faint=parts[name])
        for name in palette.names
        if name in parts
    ]
    if mixed:
        lines.append(Line("all budgets" if not parts else "mixed steps", "ink", smooth(mixed), faint=mixed))
    if not lines:
        return ""
    chart = replace(base, lines=lines, y_title="nats per token", y_format=say.loss)
    notes = {
        "loss": "Each step trains one budget; the colour says which.",
        "kd_loss": "Distance between the predictions of a submodel and those of its frozen parent.",
    }
    extra = [("ink", "mixed steps")] if mixed and parts else []
    note = notes[key] if parts or key != "loss" else "Every step mixes several budgets."
    return figure(
        base.label, note, legend([n for n in palette.names if n in parts], palette, extra), chart.draw()
    )


def _one_line(run: RunData, at: str, base: LineChart, key: str) -> str:
    points = [(step[at], step[key]) for step in run.steps if finite(step.get(key))]
    if len(points) < 2:
        return ""
    raw = points if key == "grad_norm" else ()
    line = Line(base.label.lower(), "ink", smooth(points) if raw else points, faint=raw)
    show: Callable[[float], str] = _exponent if key == "lr" else say.significant
    return figure(base.label, "", replace(base, lines=[line], y_format=show).draw())


def _exponent(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}".replace("e-0", "e-")


def smooth(points: list[Point]) -> list[Point]:
    """Moving average of y, centred, over 1/`SMOOTHING` of the points; at both ends over what there is."""
    half = len(points) // SMOOTHING // 2
    if half == 0:
        return points
    total = np.concatenate([[0.0], np.cumsum([y for _, y in points])])
    index = np.arange(len(points))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(points))
    means = (total[high] - total[low]) / (high - low)
    return [(x, float(y)) for (x, _), y in zip(points, means, strict=True)]


def _x_key(lines: list[Json]) -> str:
    return "tokens" if lines and all(finite(line.get("tokens")) for line in lines) else "step"


def _x_title(key: str) -> str:
    return "training tokens" if key == "tokens" else "step"


def _stage_changes(run: RunData, at: str) -> list[tuple[float, str, str]]:
    """Vertical marks where a new stage begins; none for the first."""
    changes = []
    for before, step in zip(run.steps, run.steps[1:], strict=False):
        if step.get("stage") != before.get("stage") and step.get("stage") and finite(step.get(at)):
            changes.append((step[at], str(step["stage"]), ""))
    return changes
