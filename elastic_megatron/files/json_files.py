"""JSON objects in files: bounded where they are read, strict (RFC 8259) where they are written."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from .reading import read_text
from .writing import write_text

# Python's objects take up to fifty times the text; the index of 80,000 tensors has as much
_LIMIT = 8 << 20
_DEPTH = 64
_LARGEST = 3.4028234663852886e38
# how transformers 5 writes what JSON lacks
_TAG, _TAGGED = "__float__", {"Infinity": _LARGEST, "-Infinity": -_LARGEST, "NaN": None}
# whole numbers of more digits are in no file, and overflow where they are divided
_DIGITS = 40
_HALF_CHARACTER = re.compile(rb"\\u[dD][89a-fA-F]")


def read_object(
    file: Path, missing: str, damaged: str = "copy it again", limit: int = _LIMIT
) -> dict[str, Any]:
    """The object in a file. ``Infinity`` and ``NaN``, which older Python programs write, are read, and so is a BOM.

    Args:
        missing, damaged: the remedies, for the message.
        limit: bytes that the file may have.

    Raises ``UserError`` where the file is missing or holds anything else.
    """
    try:
        data = parse(read_text(file, limit).removeprefix("\ufeff"))
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


def parse_line(text: str | bytes) -> dict[str, Any] | None:
    """The object of a line; ``None`` for a line that was cut off, or is damaged otherwise."""
    try:
        found = parse(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def strict(data: Any, *, indent: int | None = None) -> str:
    """A value as strict JSON. Raises ``ValueError`` for numbers that JSON does not have."""
    return json.dumps(data, indent=indent, allow_nan=False)


def write_object(file: Path, data: Any, *, indent: int | None = 1) -> None:
    """Write a value as strict JSON, atomically. Raises ``ValueError`` for numbers that JSON does not have."""
    write_text(file, strict(data, indent=indent) + "\n")


def finite(value: Any) -> Any:
    """A value with null for every number that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_numbers(value: Any) -> Any:
    """A value of a configuration, with numbers that every reader of JSON takes for numbers.

    Infinity becomes the largest fp32 number. Python writes ``Infinity``, which is no JSON, and transformers 5
    ``{"__float__": "Infinity"}``, which mlx-lm and llama.cpp take for an object. In configurations infinity is a bound
    (``time_step_limit`` of Nemotron-H), and what is computed in fp32 or less never lies between the two. NaN states
    nothing, as null.
    """
    if isinstance(value, dict):
        if value.keys() == {_TAG} and isinstance(value[_TAG], str) and value[_TAG] in _TAGGED:
            return _TAGGED[value[_TAG]]
        return {key: plain_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_numbers(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(_LARGEST, value)
    return value
