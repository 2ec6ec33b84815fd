"""Documents out of text files, JSON lines and chats, one after another, with errors that name file:line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from elastic_megatron.data.inputs import BOM, Input, Opened, Reading, named_json_lines, refuse_nul
from elastic_megatron.data.json_lines import LINE_LIMIT, BadLine, chat_of, text_of
from elastic_megatron.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CHUNK = 1 << 20
TEXT_LIMIT = 1 << 30
# an archive that unpacks to so much, and to so many times its size, is no text
_BOMB_BYTES, _BOMB_RATIO = 128 << 20, 100


@dataclass(frozen=True)
class Document:
    """One text, the bytes of input read to get it (for progress), and where it came from: a file, or file:line."""

    text: str
    source_bytes: int
    where: str


@dataclass
class Left:
    """Lines or documents that were left out for one reason: how many, and where the first is."""

    count: int
    first: str


@dataclass
class Tally:
    """What was left out, by reason."""

    left: dict[str, Left] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        self.left.setdefault(reason, Left(0, where)).count += 1


def read_documents(
    inputs: Sequence[Input], reading: Reading, chat_tokenizer: PreTrainedTokenizerFast | None, tally: Tally
) -> Iterator[Document]:
    """Documents of ``inputs`` in order; empty ones are left out, and counted in ``tally``.

    JSON lines hold one object per line: the text under a key, or, with ``chat_tokenizer``, ``messages`` (and
    optionally ``tools``) rendered by its chat template. They are read line by line. A text is one document, read into
    memory whole. A byte order mark belongs to neither.

    Raises ``UserError`` naming file and line for what is not UTF-8, not JSON or not of that shape, and for a text
    that is JSON as a whole; lines are left out instead, and counted, where ``reading`` says so.
    """
    for source in inputs:
        with source.reading() as opened:
            if source.form == "text":
                yield from _text(source, opened, reading, tally)
            else:
                yield from _json_lines(source, opened, reading, chat_tokenizer, tally)


def _text(source: Input, opened: Opened, reading: Reading, tally: Tally) -> Iterator[Document]:
    raw = bytearray()
    while part := opened.file.read(_CHUNK):
        raw += part
        if source.packing is not None and len(raw) > max(
            _BOMB_BYTES, _BOMB_RATIO * (source.size or len(raw))
        ):
            raise UserError(
                f"{source.path}: unpacks to more than {_BOMB_RATIO} times its size, so it is no text; give text"
            )
        if len(raw) > TEXT_LIMIT:
            raise UserError(
                f"{source.path} is larger than {TEXT_LIMIT >> 30} GiB, too much for one document; split it, or write "
                "a JSON line for each document"
            )
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{source.path}:{line}: not UTF-8 text; convert the file to UTF-8") from None
    refuse_nul(source.path, raw)
    if not reading.as_text:
        _refuse_json(source, text)
    if text:
        yield Document(text, opened.consumed(), str(source.path))
    else:
        tally.add("empty text", str(source.path))


def _refuse_json(source: Input, text: str) -> None:
    """Raise ``UserError`` where a text is one JSON object or list, which nobody wants tokenised as it is."""
    if not text.lstrip().startswith(("{", "[")):
        return
    try:
        if not isinstance(json.loads(text), dict | list):
            return
    except (ValueError, RecursionError):
        return
    raise UserError(
        f"{source.path} is one JSON value over several lines, not text; write JSON lines with jq -c '.[]' (or jq -c "
        ".), or give --as-text to take it as it is"
    )


def _json_lines(
    source: Input,
    opened: Opened,
    reading: Reading,
    chat_tokenizer: PreTrainedTokenizerFast | None,
    tally: Tally,
) -> Iterator[Document]:
    number, before = 0, 0
    while line := opened.file.readline(LINE_LIMIT + 1):
        number += 1
        where = f"{source.path}:{number}"
        if not line.removeprefix(BOM).strip():
            tally.add("blank line", where)
            continue
        try:
            text = text_of(line, reading.key) if chat_tokenizer is None else chat_of(line, chat_tokenizer)
        except BadLine as error:
            if not reading.skip_bad_lines:
                raise UserError(f"{where}: {error}{_ways_out(source, reading)}") from None
            tally.add(error.reason, where)
            _to_line_end(opened, line)
            continue
        if not text:
            tally.add("empty text", where)
            continue
        done = opened.consumed()
        yield Document(text, done - before, where)
        before = done


def _to_line_end(opened: Opened, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = opened.file.readline(_CHUNK)


def _ways_out(source: Input, reading: Reading) -> str:
    """The other ways out: another one where the input was taken for JSON lines because it looks so."""
    guessed = not reading.asks_json_lines and not named_json_lines(source.path)
    other = ", --as-text takes the input as text" if guessed else ""
    return f" (--skip-bad-lines leaves such lines out{other})"
