"""What the ranking found: sorted scores per axis and layer, where the sizes cut, experts and depth."""

from elastic_megatron.report import format as say
from elastic_megatron.report import svg
from elastic_megatron.report.family import full_width
from elastic_megatron.report.markup import Palette, figure, grid, legend, section
from elastic_megatron.report.ranking import NEGLECTED, Ranking, ScoreCurve
from elastic_megatron.report.read import RunData
from elastic_megatron.report.svg import Frame, Scale

WIDTH, HEIGHT = 340, 220
POINTS = 64


def importance(run: RunData, palette: Palette) -> str | None:
    """Small multiples, one per axis, then tokens per expert and the score of every layer."""
    ranking = run.ranking
    if ranking is None:
        return None
    panels = [_axis_panel(run, palette, axis, curves) for axis, curves in ranking.curves.items()]
    cards = [grid(*panels, kind="small")] if panels else []
    wide = [card for card in (_expert_card(ranking), _depth_card(ranking)) if card]
    cards += [grid(*wide, kind="pair loose")] if wide else []
    if not cards:
        return None
    measured = f" over {say.count(ranking.tokens)} tokens" if ranking.tokens else ""
    lead = (
        f"Before training, every component was scored{measured} and sorted, best first. One line per layer; "
        "coloured marks show where the sizes cut. The steeper a line falls, the less a cut costs."
    )
    cutting = [name for name in palette.names if run.submodels.get(name, {}).get("widths")]
    return section("importance", "Importance", lead, legend(cutting, palette), *cards)


def _axis_panel(run: RunData, palette: Palette, axis: str, curves: list[ScoreCurve]) -> str:
    frame = Frame(Scale(0, 1, 40, WIDTH - 12), Scale(0, 1.05, HEIGHT - 42, 24))
    body = frame.axes("components kept", "score, of best", say.percent, say.percent, [0, 0.25, 0.5, 0.75, 1])
    for curve in curves:
        best = float(curve.scores.max()) or 1.0
        last = max(len(curve.scores) - 1, 1)
        points = [(i / last, float(score) / best) for i, score in enumerate(curve.scores)]
        drawn = frame.place(svg.thin_out(points, POINTS))
        tip = f"{curve.name}: the best half carries {say.percent(curve.kept(0.5))} of the score"
        body.append(svg.path(drawn, class_="line layer", data_tip=tip))
    for name, m in run.submodels.items():
        chosen = (m.get("widths") or {}).get(axis)
        if chosen is not None and name in palette.names:
            part = say.mean_width(chosen) / full_width(run, axis)
            x = frame.x(min(part, 1.0))
            tip = f"{name} keeps {say.width(chosen)} ({say.percent(part)})"
            colour = palette.colour(name)
            body.append(
                svg.element("line", x1=x, x2=x, y1=frame.y(0), y2=frame.y(1.05), class_=f"cut {colour}")
            )
            top = (x, frame.y(1.05))
            body.append(svg.marker(palette.shape(name), top, 5, class_=f"mark {colour}", data_tip=tip))
    kept = [curve.kept(0.5) for curve in curves]
    note = f"The best half carries {_spread(kept)} of the score."
    title = say.axis_title(axis)
    drawing = svg.picture(body, WIDTH, HEIGHT, f"Sorted scores of {title}. {note}", class_="chart panel")
    return figure(title.capitalize(), note, drawing)


def _spread(parts: list[float]) -> str:
    low, high = say.percent(min(parts)), say.percent(max(parts))
    return low if low == high else f"{low} to {high}"


def _expert_card(ranking: Ranking) -> str:
    if not ranking.expert_tokens:
        return ""
    layers = ranking.expert_tokens
    n = max(len(seen) for seen in layers.values())
    row, left, width = 20, 70, 520
    x = Scale(0, n, left, width - 84)
    body = [svg.text("share of tokens, busiest expert first", left, 12, class_="axis-title")]
    for place, (layer, seen) in enumerate(layers.items()):
        top = 20 + place * row
        busiest_first = sorted(seen.tolist(), reverse=True)
        shares = [tokens / max(2 * seen.mean(), 1e-12) for tokens in busiest_first]
        body.append(
            svg.element("rect", x=left, y=top, width=width - 84 - left, height=row - 1, class_="cell-back")
        )
        body += svg.heat_rows([shares], x, top, row, "accent")
        body.append(svg.text(f"layer {layer}", left - 7, top + row / 2, class_="tick y"))
        low = ranking.neglected().get(layer, 0)
        words = f"{low} neglected" if low else "all used"
        style = "tick note-right strong" if low else "tick note-right"
        body.append(svg.text(words, width - 78, top + row / 2, class_=style))
    told = f"Tokens per expert in {len(layers)} layers"
    low = sum(ranking.neglected().values())
    verdict = (
        f"{low} of {sum(map(len, layers.values()))} experts saw less than {say.percent(NEGLECTED)} of their "
        "fair share of tokens: their scores are uncertain."
        if low
        else f"Every expert saw at least {say.percent(NEGLECTED)} of its fair share of tokens."
    )
    drawing = svg.picture(body, width, 26 + row * len(layers), told, class_="chart experts")
    return figure("Tokens seen by each expert", verdict, drawing)


def _depth_card(ranking: Ranking) -> str:
    if ranking.depth is None:
        return ""
    scores = ranking.depth
    width, height = 520, 240
    frame = Frame(
        Scale(0, len(scores), 58, width - 14), Scale(0, float(scores.max()) * 1.05 or 1, height - 44, 34)
    )
    body = frame.axes("layer", "score", lambda v: f"{v:.0f}", say.significant, [])
    for i, score in enumerate(scores.tolist()):
        y = frame.y(max(score, 0.0))
        kind = ranking.layer_types[i] if i < len(ranking.layer_types) else ""
        named = say.LAYER_NAMES.get(kind, "")
        tip = f"layer {i} {named}: {say.significant(score)}"
        body.append(
            svg.element(
                "rect",
                x=frame.x(i + 0.12),
                y=y,
                width=frame.x(0.76) - frame.x(0),
                height=frame.y.start - y,
                class_="bar-mark accent",
                data_tip=tip,
            )
        )
        few = len(scores) <= 26
        if few or i % 5 == 0:
            body.append(
                svg.text(
                    kind if few and kind else str(i), frame.x(i + 0.5), frame.y.start + 16, class_="tick x"
                )
            )
    note = (
        "How much the output changes when a layer is left out (M Mamba, E mixture of experts, * attention)."
    )
    return figure("Layers", note, svg.picture(body, width, height, "Score of every layer", class_="chart"))
