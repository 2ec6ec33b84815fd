"""The end of the page: where the time went, what every size writes, and how the run was made."""

from collections import defaultdict
from statistics import median

from elastic_megatron.report import format as say
from elastic_megatron.report.format import finite
from elastic_megatron.report.markup import Palette, bar, escape, facts, figure, grid, named, section
from elastic_megatron.report.read import RunData, budget_of


def time(run: RunData, palette: Palette) -> str | None:
    """Phases as a waterfall, and the median step time of every budget."""
    cards = [card for card in (_phases(run), _step_times(run, palette)) if card]
    if not cards:
        return None
    phases = [phase for phase in run.report.get("phases") or [] if finite(phase.get("seconds"))]
    total = sum(phase["seconds"] for phase in phases)
    lead = ""
    if total > 0:
        longest = max(phases, key=lambda phase: phase["seconds"])
        share = say.percent(longest["seconds"] / total)
        lead = f"{say.duration(total)} in all, {share} of it in “{longest['name']}”."
    return section("time", "Where the time went", lead, grid(*cards))


def _phases(run: RunData) -> str:
    phases = [phase for phase in run.report.get("phases") or [] if finite(phase.get("seconds"))]
    total = sum(phase["seconds"] for phase in phases)
    if total <= 0:
        return ""
    rows, start = [], 0.0
    for phase in phases:
        part = phase["seconds"] / total
        rows.append(
            f"<li><span>{escape(phase['name'])}</span>{bar(part, 'accent', start)}"
            f"<span>{say.duration(phase['seconds'])}</span></li>"
        )
        start += part
    return figure("Phases, one after the other", "", f'<ul class="bars">{"".join(rows)}</ul>')


def _step_times(run: RunData, palette: Palette) -> str:
    times: dict[str, list[float]] = defaultdict(list)
    for step in run.steps:
        name = budget_of(step)
        if name is not None and finite(step.get("step_ms")):
            times[name].append(step["step_ms"])
    middle = {name: median(times[name]) for name in palette.names if name in times}
    if not middle or max(middle.values()) <= 0:
        return ""
    rows = "".join(
        f"<li><span>{named(name, palette)}</span>{bar(ms / max(middle.values()), palette.colour(name))}"
        f"<span>{say.significant(ms)} ms</span></li>"
        for name, ms in middle.items()
    )
    note = "Median over the steps that trained only this budget."
    return figure("Time of one training step", note, f'<ul class="bars">{rows}</ul>')


def samples(run: RunData, palette: Palette) -> str | None:
    """One text per size, as it was generated."""
    cards = [
        f'<figure class="card sample {palette.colour(name)}">'
        f"<figcaption><h3>{named(name, palette)}</h3></figcaption>"
        f"<blockquote>{escape(m['sample'])}</blockquote></figure>"
        for name, m in run.submodels.items()
        if m.get("sample")
    ]
    if not cards:
        return None
    lead = "The same checkpoint, cut to each size, continues a text. Unedited."
    return section("samples", "In their own words", lead, grid(*cards, kind="small"))


def made(run: RunData) -> str:
    """Command, versions, seed, machine: what another person needs to get the same numbers."""
    report, data, parent = run.report, run.report.get("data") or {}, run.parent
    pattern = parent.get("pattern")
    cards = [
        figure(
            "Run",
            "",
            facts(
                [
                    ("created", report.get("created")),
                    ("seed", report.get("seed")),
                    ("training tokens", _amount(data.get("train_tokens"))),
                    ("evaluation tokens", _amount(data.get("eval_tokens"))),
                    ("loss unit", data.get("unit")),
                    ("layers of the parent", pattern),
                    ("hidden size of the parent", parent.get("hidden_size")),
                ]
            ),
        ),
        figure(
            "Machine",
            "",
            facts((key.replace("_", " "), v) for key, v in (report.get("machine") or {}).items()),
        ),
        figure("Versions", "", facts((report.get("versions") or {}).items())),
    ]
    filled = [card for card in cards if "<dl" in card]
    body = grid(*filled, kind="small") if filled else ""
    if report.get("command"):
        body = f'<pre class="command" tabindex="0"><code>{escape(report["command"])}</code></pre>' + body
    if run.recipe:
        body += (
            f'<details><summary>The resolved recipe</summary><pre tabindex="0"><code>{escape(run.recipe)}'
            "</code></pre></details>"
        )
    if run.unreadable_lines:
        noun = "line" if run.unreadable_lines == 1 else "lines"
        body += f"<p>{run.unreadable_lines} {noun} of metrics.jsonl could not be read and are not shown.</p>"
    return section("made", "How this was made", "", body)


def _amount(value: float | None) -> str | None:
    return f"{value:,}".replace(",", " ") if finite(value) else None
