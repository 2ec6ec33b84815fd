"""Small SVG vocabulary: elements, scales, axes, lines, markers, heat maps. Strings in, strings out.

Colours are never written here: every mark carries a CSS class (`m0`…`m7` for the submodels, `ink`,
`parent`) that the page's style sheet resolves for light and dark. Coordinates are viewBox units, so a
chart scales with its column.
"""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from elastic_megatron.report.format import trimmed

Point = tuple[float, float]


def element(tag: str, *children: str, **attributes: str | float | None) -> str:
    """One element; children are markup already, attribute values are escaped.

    ``class_`` becomes ``class``, other underscores become hyphens, and None leaves the attribute out.
    """
    parts = [tag]
    for name, value in attributes.items():
        if value is not None:
            shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
            parts.append(f'{name.rstrip("_").replace("_", "-")}="{html.escape(shown)}"')
    return f"<{' '.join(parts)}>{''.join(children)}</{tag}>"


def text(content: str, x: float, y: float, **attributes: str | float | None) -> str:
    """A `<text>` element."""
    return element("text", html.escape(content), x=float(x), y=float(y), **attributes)


def picture(body: Iterable[str], width: float, height: float, label: str, **attributes: str | None) -> str:
    """The outer ``<svg>``, announced to screen readers as one image described by ``label``."""
    box = f"0 0 {width:g} {height:g}"
    return element("svg", *body, viewBox=box, role="img", aria_label=label, **attributes)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values (1, 2, 2.5 or 5 × 10ⁿ apart) inside [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    raw = span / about
    power = 10 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Scale:
    """Linear map of the data interval [low, high] onto [start, end] in viewBox units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        part = (value - self.low) / span if span else 0.5
        return self.start + part * (self.end - self.start)

    @staticmethod
    def around(values: Sequence[float], start: float, end: float, pad: float = 0.06) -> "Scale":
        """A scale that shows all ``values`` with ``pad`` of air at both ends."""
        low, high = min(values), max(values)
        air = (high - low) * pad or abs(high) * pad or 1.0
        return Scale(low - air, high + air, start, end)


@dataclass(frozen=True)
class Frame:
    """Plot area of a chart with its two scales (y grows upward: ``y.start`` is the bottom edge)."""

    x: Scale
    y: Scale

    def axes(
        self,
        x_title: str,
        y_title: str,
        x_format: Callable[[float], str],
        y_format: Callable[[float], str],
        x_ticks: Sequence[float] | None = None,
    ) -> list[str]:
        """Grid lines, tick labels and axis titles; the y title sits above the axis, read without tilting."""
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        marks = []
        for value in nice_ticks(self.y.low, self.y.high):
            y = self.y(value)
            marks.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="gridline"))
            marks.append(text(trimmed(y_format(value)), left - 7, y, class_="tick y"))
        for value in nice_ticks(self.x.low, self.x.high) if x_ticks is None else x_ticks:
            marks.append(text(trimmed(x_format(value)), self.x(value), bottom + 19, class_="tick x"))
        marks.append(element("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"))
        marks.append(text(x_title, right, bottom + 39, class_="axis-title end"))
        marks.append(text(y_title, 2, top - 12, class_="axis-title"))
        return marks

    def place(self, points: Iterable[Point]) -> list[Point]:
        return [(self.x(x), self.y(y)) for x, y in points]

    def clip(self, name: str) -> str:
        """A ``clipPath`` of the plot area, for marks that may leave it; refer to it as ``url(#name)``."""
        left, top = self.x.start, self.y.end
        area = element("rect", x=left, y=top, width=self.x.end - left, height=self.y.start - top)
        return element("clipPath", area, id=name)


def path(points: Sequence[Point], **attributes: str | float | None) -> str:
    """A polyline through placed points."""
    steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return element("path", d=f"M{steps}", fill="none", **attributes)


def marker(shape: int, at: Point, radius: float, **attributes: str | float | None) -> str:
    """Circle, square, triangle or diamond by ``shape % 4``: names stay apart without colour."""
    x, y = at
    if shape % 4 == 0:
        return element("circle", cx=x, cy=y, r=radius, **attributes)
    r = radius * 1.15
    corners = {
        1: [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
        2: [(0.0, -1.05), (1.0, 0.75), (-1.0, 0.75)],
        3: [(0.0, -1.15), (1.15, 0.0), (0.0, 1.15), (-1.15, 0.0)],
    }[shape % 4]
    points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners)
    return element("polygon", points=points, **attributes)


def heat_rows(
    rows: Sequence[Sequence[float]], x: Scale, top: float, row_height: float, colour: str, levels: int = 20
) -> list[str]:
    """A heat map of values 0…1, one list per row; column i covers [i, i + 1] of scale ``x``.

    Equal neighbours (after rounding to ``levels``) share one rectangle, so a settled router costs a
    handful of elements however long the run was.
    """
    marks = []
    for index, row in enumerate(rows):
        shades = [round(min(max(value, 0.0), 1.0) * levels) for value in row]
        start = 0
        for i in range(1, len(shades) + 1):
            if i < len(shades) and shades[i] == shades[start]:
                continue
            if shades[start]:
                marks.append(
                    element(
                        "rect",
                        x=x(start),
                        y=float(top + index * row_height),
                        width=x(i) - x(start) + 0.15,
                        height=float(row_height - 1),
                        class_=f"cell {colour}",
                        fill_opacity=f"{shades[start] / levels:g}",
                    )
                )
            start = i
    return marks


def thin_out(points: Sequence[Point], at_most: int) -> list[Point]:
    """At most ``at_most`` points, each the mean of a run of neighbours; first and last stay put."""
    if len(points) <= at_most:
        return list(points)
    inner = points[1:-1]
    edges = [round(i * len(inner) / (at_most - 2)) for i in range(at_most - 1)]
    groups = [inner[a:b] for a, b in pairwise(edges)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [points[0], *means, points[-1]]
