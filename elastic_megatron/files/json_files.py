"""JSON objects in files: bounded where they are read, strict (RFC 8259) where they are written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import UserError
from .reading import TEXT_LIMIT, read_text
from .writing import write_text

_DEPTH = 64
# whole numbers of more digits are in no file, and overflow where they are divided
_DIGITS = 40
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


def read_object(
    file: Path, missing: str, damaged: str = "copy it again", limit: int = TEXT_LIMIT
) -> dict[str, Any]:
    """The object in a file. ``Infinity`` and ``NaN``, which older Python programs write, are read.

    Args:
        missing, damaged: the remedies, for the message.
        limit: bytes that the file may have.

    Raises ``UserError`` where the file is missing or holds anything else.
    """
    try:
        data = parse(read_text(file, limit))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {missing}") from None
    except OSError as e:
        raise UserError(f"{file} cannot be read ({e.strerror}); {missing}") from None
    except UserError:
        raise
    except ValueError as e:
        raise UserError(f"{file} is no valid JSON ({e}); {damaged}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} holds a {type(data).__name__}, not an object; {damaged}")
    return data


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises ``ValueError`` where it is none, is nested beyond all reason, says two things under one key, or holds numbers
    or characters that nothing can be done with.
    """
    try:
        data = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    raw = text if isinstance(text, bytes) else text.encode("utf-8")
    if _HALF_CHARACTER.search(raw):
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # UnicodeEncodeError is a ValueError
    level = [data]
    for _ in range(_DEPTH):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return data
    raise ValueError("nested too deeply")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            if found[name] != value:
                raise ValueError(f"key {name[:60]!r} is given twice, with two values")
    return found


def _integer(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def write_object(file: Path, data: Any, *, indent: int | None = 1) -> None:
    """Write a value as strict JSON, atomically. Raises ``ValueError`` for numbers that JSON does not have."""
    write_text(file, json.dumps(data, indent=indent, allow_nan=False) + "\n")
