"""HTML building blocks shared by the sections of the page. Everything that came from a run is escaped."""

import html
from collections.abc import Iterable
from dataclasses import dataclass

from elastic_megatron.report import svg

COLOURS = 8


@dataclass(frozen=True)
class Palette:
    """One colour class and one marker shape per submodel name, the same on the whole page."""

    names: tuple[str, ...]

    def colour(self, name: str) -> str:
        return f"m{self.names.index(name) % COLOURS}"

    def shape(self, name: str) -> int:
        return self.names.index(name)


def escape(value: object) -> str:
    """Text as HTML."""
    return html.escape(str(value))


def section(key: str, title: str, lead: str, *bodies: str) -> str:
    """A page section with anchor ``key``; ``lead`` is text that says in words what the pictures show."""
    heading = f'<h2 id="{key}-title">{escape(title)}</h2>'
    words = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f'<section id="{key}" aria-labelledby="{key}-title">{heading}{words}{"".join(bodies)}</section>'


def figure(title: str, note: str, *bodies: str, kind: str = "") -> str:
    """A card: heading, one sentence on how to read it, and the picture."""
    words = f"<p>{escape(note)}</p>" if note else ""
    head = f"<figcaption><h3>{escape(title)}</h3>{words}</figcaption>"
    return f'<figure class="card {kind}">{head}{"".join(bodies)}</figure>'


def grid(*cards: str, kind: str = "pair") -> str:
    """Cards side by side."""
    return f'<div class="grid {kind}">{"".join(cards)}</div>'


def swatch(colour: str, shape: int) -> str:
    """The marker of a submodel, inline with text."""
    mark = svg.marker(shape, (8, 8), 5.5, class_=f"mark {colour}")
    return svg.element("svg", mark, viewBox="0 0 16 16", class_="swatch", aria_hidden="true")


def named(name: str, palette: Palette) -> str:
    """A submodel's marker and name."""
    return f"{swatch(palette.colour(name), palette.shape(name))}{escape(name)}"


def legend(names: Iterable[str], palette: Palette, extra: Iterable[tuple[str, str]] = ()) -> str:
    """Submodel keys; ``extra`` holds (CSS class of a stroke sample, words)."""
    keys = [f"<li>{named(name, palette)}</li>" for name in names]
    keys += [f'<li><i class="stroke {style}"></i>{escape(words)}</li>' for style, words in extra]
    return f'<ul class="legend">{"".join(keys)}</ul>' if len(keys) > 1 else ""


def bar(part: float, colour: str, start: float = 0.0) -> str:
    """A horizontal bar from ``start`` over ``part`` of the available width (both 0…1); decoration only."""
    return (
        f'<span class="bar" aria-hidden="true">'
        f'<i class="{colour}" style="--from:{start:.4f};--part:{max(part, 0.0):.4f}"></i></span>'
    )


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """A definition list; pairs without a value are left out."""
    rows = [
        f"<div><dt>{escape(key)}</dt><dd>{escape(value)}</dd></div>"
        for key, value in pairs
        if value not in (None, "")
    ]
    return f'<dl class="facts">{"".join(rows)}</dl>' if rows else ""
