"""Documents out of text files, JSON lines and chats, one after another, with errors that name file:line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from elastic_megatron.errors import UserError

JSON_LINES_SUFFIXES = (".jsonl", ".json")


@dataclass(frozen=True)
class Document:
    """One text, and the bytes of input read to get it (for progress)."""

    text: str
    source_bytes: int


def check_inputs(inputs: Sequence[Path], *, chat: bool) -> None:
    """Raise ``UserError`` unless every input is a readable kind of file, before any work is done."""
    if not inputs:
        raise UserError("no input files; give at least one text or .jsonl file")
    for path in inputs:
        if path.is_dir():
            raise UserError(f"{path}: is a directory; name its files, for example {path}/*.jsonl")
        if not path.is_file():
            raise UserError(f"{path}: no such file; give a text file or a .jsonl file")
        if chat and path.suffix not in JSON_LINES_SUFFIXES:
            raise UserError(f'{path}: chats are read from .jsonl files, one {{"messages": [...]}} per line')


def read_documents(
    inputs: Sequence[Path], *, json_key: str, chat_tokenizer: PreTrainedTokenizerFast | None
) -> Iterator[Document]:
    """Documents of ``inputs`` in order; empty ones are left out.

    A ``.jsonl`` or ``.json`` file holds one JSON object per line: the text under ``json_key``, or, with
    ``chat_tokenizer``, ``messages`` (and optionally ``tools``) rendered by its chat template. Any other
    file is one document, read into memory whole.

    Raises ``UserError`` naming file and line for what is not UTF-8, not JSON or not of that shape.
    """
    for path in inputs:
        if path.suffix in JSON_LINES_SUFFIXES:
            yield from _read_json_lines(path, json_key, chat_tokenizer)
        else:
            yield from _read_text(path)


def _read_text(path: Path) -> Iterator[Document]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; convert the file to UTF-8") from error
    if text:
        yield Document(text, len(raw))


def _read_json_lines(
    path: Path, json_key: str, chat_tokenizer: PreTrainedTokenizerFast | None
) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            record = _parse(raw, where)
            if chat_tokenizer is None:
                text = _text_of(record, json_key, where)
            else:
                text = _render_chat(record, chat_tokenizer, where)
            _check_encodable(text, where)
            if text:
                yield Document(text, len(raw))


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text; convert the file to UTF-8") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where}: not JSON ({error.msg}, column {error.colno}); each line must be one JSON object"
        ) from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: a JSON {type(record).__name__}; each line must be one JSON object")
    return record


def _text_of(record: dict[str, Any], json_key: str, where: str) -> str:
    if json_key not in record:
        keys = ", ".join(sorted(record)) or "none"
        remedy = "use --chat" if "messages" in record else "set --json-key"
        raise UserError(f"{where}: no key '{json_key}' (keys: {keys}); {remedy}")
    text = record[json_key]
    if not isinstance(text, str):
        raise UserError(f"{where}: '{json_key}' is a {type(text).__name__}, not a string; set --json-key")
    return text


def _render_chat(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast, where: str) -> str:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise UserError(
            f"{where}: 'messages' must be a non-empty list of objects with 'role' and 'content'; fix the line"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tools=record.get("tools"), tokenize=False)
    except Exception as error:  # templates are programs: they may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{where}: the chat template of the tokenizer refuses these messages ({reason}); fix the line"
        ) from error
    assert isinstance(text, str)
    return text


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: half of a surrogate pair at character {error.start}; write the whole character"
        ) from error
