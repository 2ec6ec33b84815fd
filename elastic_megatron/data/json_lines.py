"""The text in one JSON line, or why it has none. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# a document of more is a mistake, and so is a line without an end
LINE_LIMIT = 128 << 20
# Python refuses to read longer integers, which takes quadratic time
_DIGITS = 4300
_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
_ARRAY = "of an array or an object over several lines, jq -c '.[]' or jq -c . makes JSON lines"


class BadLine(Exception):
    """A line that cannot be used.

    Args:
        reason: the kind of fault, to count lines by.
        message: what is wrong with this line, and the remedy.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def text_of(line: bytes, key: str) -> str:
    """The text under a key of the line's object. Raises ``BadLine`` where there is none."""
    record = _record(line)
    if key not in record:
        remedy = "use --chat" if "messages" in record else "set --json-key"
        raise BadLine("no key", f"no key {key!r} (keys: {_shown(record)}); {remedy}")
    text = record[key]
    if not isinstance(text, str):
        raise BadLine("no string", f"{key!r} is {_kind(text)}, not a string; fix the line, or set --json-key")
    return _encodable(text)


def chat_of(line: bytes, tokenizer: PreTrainedTokenizerFast) -> str:
    """The conversation under ``messages``, rendered by the chat template. Raises ``BadLine`` where there is none."""
    record = _record(line)
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise BadLine(
            "no messages",
            "'messages' must be a non-empty list of objects with 'role' and 'content'"
            f" (keys: {_shown(record)}); fix the line",
        )
    try:
        text = tokenizer.apply_chat_template(messages, tools=record.get("tools"), tokenize=False)
    except Exception as error:  # templates are programs: they may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadLine(
            "refused by the chat template",
            f"the chat template of the tokenizer refuses these messages ({reason}); fix the line",
        ) from error
    assert isinstance(text, str)
    return _encodable(text)


def _record(line: bytes) -> dict[str, Any]:
    if len(line) > LINE_LIMIT:
        raise BadLine("too long", f"longer than {LINE_LIMIT >> 20} MiB; write a line a document")
    try:
        text = line.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise BadLine("not UTF-8", "not UTF-8 text; convert the file to UTF-8") from None
    try:
        record = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        remedy = f"; {_ARRAY}" if text.strip() in ("{", "[") or text.lstrip().startswith("[{") else ""
        raise BadLine(
            "not JSON",
            f"not JSON ({error.msg}, column {error.colno}); each line must be one JSON object{remedy}",
        ) from None
    except RecursionError:
        raise BadLine("nested too deeply", "JSON nested too deeply; fix the line") from None
    if not isinstance(record, dict):
        raise BadLine("no object", f"{_kind(record)} in JSON; each line must be one JSON object; {_ARRAY}")
    return record


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadLine("repeated key", f"the key {twice[:40]!r} is given twice; fix the line")
    return found


def _integer(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= _DIGITS else Decimal(digits)


def _kind(value: object) -> str:
    return _KINDS.get(type(value), "a number")


def _shown(record: Mapping[str, Any]) -> str:
    keys = [key[:40] for key in sorted(record)[:12]]
    return ", ".join(keys + ["..."] * (len(record) > 12)) or "none"


def _encodable(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadLine(
            "half of a surrogate pair",
            f"half of a surrogate pair at character {error.start}; write the whole character",
        ) from None
    return text
