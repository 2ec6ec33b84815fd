"""Two finished charts built from the SVG vocabulary: lines over a common x, and the Pareto plot."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elastic_megatron.report import svg
from elastic_megatron.report.format import count
from elastic_megatron.report.svg import Frame, Point, Scale

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 34, 48
LONGEST_LINE = 240


@dataclass(frozen=True)
class Line:
    """One named line; ``faint`` is drawn behind it (the raw values of a smoothed line)."""

    name: str
    colour: str
    points: Sequence[Point]
    faint: Sequence[Point] = ()
    dashed: bool = False
    shape: int | None = None


@dataclass(frozen=True)
class LineChart:
    """Everything a line chart says. ``levels`` are horizontal lines, ``events`` vertical ones.

    Both hold (position, label, CSS class). The y range fits lines and levels; faint lines may leave it
    (raw losses spike) unless ``fit_faint``.
    """

    key: str
    label: str
    lines: Sequence[Line]
    x_title: str
    y_title: str
    y_format: Callable[[float], str]
    x_format: Callable[[float], str] = count
    levels: Sequence[tuple[float, str, str]] = ()
    events: Sequence[tuple[float, str, str]] = ()
    height: int = HEIGHT
    fit_faint: bool = False

    def frame(self) -> Frame:
        xs = [x for line in self.lines for x, _ in line.points]
        ys = [y for line in self.lines for _, y in line.points] + [y for y, _, _ in self.levels]
        if self.fit_faint:
            ys += [y for line in self.lines for _, y in line.faint]
        return Frame(
            Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT),
            Scale.around(ys, self.height - BOTTOM, TOP),
        )

    def draw(self) -> str:
        """The ``<svg>``; it carries its own points as JSON for the hover read-out."""
        frame, clip = self.frame(), f"clip-{self.key}"
        body = [svg.element("defs", frame.clip(clip))]
        body += frame.axes(self.x_title, self.y_title, self.x_format, self.y_format)
        body += [
            self._event(frame, *event) for event in self.events if frame.x.low <= event[0] <= frame.x.high
        ]
        body += [self._level(frame, *level) for level in self.levels]
        for line in self.lines:
            if line.faint:
                raw = frame.place(svg.thin_out(line.faint, 2 * LONGEST_LINE))
                body.append(svg.path(raw, class_=f"line faint {line.colour}", clip_path=f"url(#{clip})"))
        for line in self.lines:
            body += self._line(frame, line)
        label = f"{self.label}. " + "; ".join(
            f"{line.name} ends at {self.y_format(line.points[-1][1])}" for line in self.lines
        )
        return svg.picture(
            body, WIDTH, self.height, label, class_="chart lines", data_lines=self._hover(frame)
        )

    def _line(self, frame: Frame, line: Line) -> list[str]:
        points = frame.place(svg.thin_out(line.points, LONGEST_LINE))
        style = "line dashed" if line.dashed else "line"
        drawn = [svg.path(points, class_=f"{style} {line.colour}")] if len(points) > 1 else []
        if line.shape is not None or len(points) == 1:
            drawn.append(svg.marker(line.shape or 0, points[-1], 5, class_=f"mark {line.colour}"))
        return drawn

    def _level(self, frame: Frame, value: float, label: str, colour: str) -> str:
        y = frame.y(value)
        rule = svg.element("line", x1=frame.x.start, x2=frame.x.end, y1=y, y2=y, class_=f"level {colour}")
        return rule + (svg.text(label, frame.x.end, y - 5, class_="note end halo") if label else "")

    def _event(self, frame: Frame, at: float, label: str, colour: str) -> str:
        x = frame.x(at)
        rule = svg.element("line", x1=x, x2=x, y1=frame.y.start, y2=frame.y.end, class_=f"event {colour}")
        late = x > (frame.x.start + frame.x.end) / 2
        side = "note end halo" if late else "note halo"
        return rule + svg.text(label, x - 5 if late else x + 5, frame.y.end + 12, class_=side)

    def _hover(self, frame: Frame) -> str:
        lines = [
            {
                "name": line.name,
                "colour": line.colour,
                "points": [
                    [round(frame.x(x), 1), round(frame.y(y), 1), self.x_format(x), self.y_format(y)]
                    for x, y in svg.thin_out(line.points, LONGEST_LINE // 2)
                ],
            }
            for line in self.lines
        ]
        box = [frame.x.start, frame.x.end, frame.y.end, frame.y.start]
        return json.dumps({"box": box, "x": self.x_title, "lines": lines}, separators=(",", ":"))


@dataclass(frozen=True)
class Candidate:
    """A submodel in the Pareto plot: its size, its trained loss and, if known, the loss before training."""

    name: str
    colour: str
    shape: int
    size: float
    trained: float
    before: float | None = None


def pareto_chart(
    candidates: Sequence[Candidate],
    parent: Point | None,
    others: Sequence[tuple[str, float, float]],
    x_title: str,
    y_title: str,
    y_format: Callable[[float], str],
) -> str:
    """Size against loss; an arrow leads from each sorted slice (hollow) to the trained submodel (filled)."""
    sizes = [c.size for c in candidates] + [x for _, x, _ in others] + ([parent[0]] if parent else [])
    losses = [y for c in candidates for y in (c.trained, c.before) if y is not None]
    losses += [y for _, _, y in others] + ([parent[1]] if parent else [])
    height = HEIGHT + 40
    frame = Frame(
        Scale.around(sizes, LEFT, WIDTH - RIGHT, 0.14), Scale.around(losses, height - BOTTOM, TOP, 0.16)
    )
    head = svg.element("path", d="M0 0L8 4L0 8z", class_="arrow-head")
    arrow = svg.element(
        "marker",
        head,
        id="arrow",
        viewBox="0 0 8 8",
        refX=8,
        refY=4,
        markerWidth=7,
        markerHeight=7,
        orient="auto",
    )
    body = [svg.element("defs", arrow), *frame.axes(x_title, y_title, count, y_format)]
    ordered = sorted(candidates, key=lambda c: c.size)
    if len(ordered) > 1:
        body.append(svg.path(frame.place([(c.size, c.trained) for c in ordered]), class_="frontier"))
    marked = [(c.size, y) for c in candidates for y in (c.trained, c.before) if y is not None]
    taken = [_box_at(point, 7) for point in frame.place(marked + [(x, y) for _, x, y in others])]
    for name, x, y in others:
        at = (frame.x(x), frame.y(y))
        body.append(svg.marker(1, at, 4.5, class_="mark hollow ink", data_tip=f"{name}: {y_format(y)}"))
        body.append(_label(name, at, "note", taken, frame))
    if parent:
        at = (frame.x(parent[0]), frame.y(parent[1]))
        body.append(
            svg.marker(3, at, 11, class_="mark hollow parent", data_tip=f"parent: {y_format(parent[1])}")
        )
        body.append(svg.text("parent", at[0], at[1] + 28, class_="note middle halo"))
    for candidate in candidates:
        body += _candidate(frame, candidate, y_format)
        at = (frame.x(candidate.size), frame.y(candidate.trained))
        body.append(_label(candidate.name, at, "name", taken, frame))
    told = "; ".join(f"{c.name}: {count(c.size)} at {y_format(c.trained)}" for c in candidates)
    return svg.picture(body, WIDTH, height, f"{x_title} against {y_title}. {told}", class_="chart")


def _candidate(frame: Frame, c: Candidate, y_format: Callable[[float], str]) -> list[str]:
    at = (frame.x(c.size), frame.y(c.trained))
    body = []
    if c.before is not None:
        start = frame.y(c.before)
        gap = 9 if at[1] > start else -9
        if abs(at[1] - start) > 24:
            body.append(
                svg.element(
                    "line",
                    x1=at[0],
                    x2=at[0],
                    y1=start + gap,
                    y2=at[1] - gap,
                    class_="arrow",
                    marker_end="url(#arrow)",
                )
            )
        tip = f"{c.name}, sorted slice before training: {y_format(c.before)}"
        body.append(svg.marker(c.shape, (at[0], start), 5, class_=f"mark hollow {c.colour}", data_tip=tip))
    tip = f"{c.name}, trained: {y_format(c.trained)} with {count(c.size)} active parameters"
    body.append(svg.marker(c.shape, at, 6, class_=f"mark {c.colour}", data_tip=tip))
    return body


Box = tuple[float, float, float, float]


def _box_at(at: Point, reach: float) -> Box:
    return (at[0] - reach, at[1] - reach, at[0] + reach, at[1] + reach)


def _label(name: str, at: Point, style: str, taken: list[Box], frame: Frame) -> str:
    """Text beside a marker, at the first of four corners where it covers nothing in ``taken``; joins it."""
    length = 8.0 * len(name)
    spots = []
    for right, rise in ((True, -9), (False, -9), (True, 19), (False, 19)):
        x, y = at[0] + (12 if right else -12), at[1] + rise
        left = x if right else x - length
        spots.append((right, x, y, (left, y - 11, left + length, y + 3)))

    def fits(box: Box) -> bool:
        inside = box[0] >= frame.x.start and box[2] <= frame.x.end + RIGHT
        return inside and not any(
            box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken
        )

    right, x, y, box = next((spot for spot in spots if fits(spot[3])), spots[0])
    taken.append(box)
    return svg.text(name, x, y, class_=f"{style} halo" if right else f"{style} end halo")
