"""What the tables of a plan have in common."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..report import format as say


def empty_table(title: str, first: str, headings: list[str]) -> Table:
    """A table whose first column names rows and whose others hold numbers."""
    table = Table(
        title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    table.caption_justify = "left"
    table.add_column(first, style="bold", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def in_bytes(size: float) -> str:
    """Binary bytes, as memory is sold: ``63155880576`` -> ``58.8 GiB``."""
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 2**power:
            return f"{say.significant(size / 2**power)} {unit}"
    return f"{size:.0f} B"


def tokens(number: int) -> str:
    """A length of sequences: ``49152`` -> ``48K``."""
    return f"{number // 1024}K" if number % 1024 == 0 else f"{number:,}"
