"""What the tools that write a table of README.md have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from elastic_megatron.errors import UserError

README = Path(__file__).resolve().parents[1] / "README.md"


def table(headings: Sequence[str], rule: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; ``rule`` aligns the columns."""
    return ["| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows)]


def markers(name: str) -> tuple[str, str]:
    """The lines around the block of that name."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def replace_block(text: str, name: str, block: str) -> str:
    """``text`` with ``block`` between its markers. Raises ``UserError`` unless each marker is there once."""
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"the file needs {begin} and, after it, {end} exactly once; add them")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{block}\n{end}{rest.split(end)[1]}"


def read_json(path: Path, command: str) -> Any:
    """Raises ``UserError``, with the command that makes the file, where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}); run {command} first") from None
    except ValueError as e:
        raise UserError(f"{path} is no valid JSON ({e}); run {command} again") from None
