"""Text, JSON lines and chats to Megatron token files.

``PREFIX.bin`` is every token of every document, one after another; ``PREFIX.idx`` says where documents
begin (``megatron/core/datasets/indexed_dataset.py``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from elastic_megatron.data.documents import Document, Tally, read_documents
from elastic_megatron.data.inputs import Input, Reading, look_into
from elastic_megatron.data.outputs import (
    BYTES,
    check_outputs,
    check_share,
    check_tokenizer,
    outputs_of,
    tokenizer_of,
)
from elastic_megatron.data.token_writer import PrepareReport, TokenWriter, publish
from elastic_megatron.data.tokenizer import byte_tokenizer, encode_batch, load_tokenizer, vocab_size
from elastic_megatron.errors import UserError
from elastic_megatron.files.lock import beside, locked
from elastic_megatron.files.writing import private_folder

# Enough for all cores of the tokenizer to be busy, little enough to hold in memory.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Job:
    """What is to be written, and how.

    Args:
        output: prefix of the data set.
        tokenizer: a Hugging Face directory, or ``bytes`` for the built-in one, which is saved as ``output_tokenizer``.
        append_eos: end each document with exactly one eos.
        valid_fraction: share of the documents that goes to ``output_valid``, the rest to ``output_train``.
        progress: called with the bytes of input done since the last call.
    """

    output: Path
    tokenizer: str | Path
    reading: Reading = field(default_factory=Reading)
    append_eos: bool = True
    valid_fraction: float | None = None
    progress: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Prepared:
    """The data sets on disk, and what was left out of them, by reason."""

    datasets: tuple[PrepareReport, ...]
    tally: Tally


def prepare(
    inputs: Sequence[Path], output: Path, tokenizer: str | Path, *, append_eos: bool = True, **reading: Any
) -> PrepareReport:
    """Write all documents of ``inputs`` to ``output.bin`` and ``output.idx``: ``run``, without a split.

    Args:
        reading: fields of ``inputs.Reading``.
    """
    how = Reading(**reading)
    return run(look_into(inputs, how), Job(output, tokenizer, how, append_eos)).datasets[0]


def run(inputs: Sequence[Input], job: Job) -> Prepared:
    """Tokenise inputs that were looked into, each document whole.

    Validation takes documents at an even stride, the i-th where ``floor((i + 1) * valid_fraction)``
    exceeds ``floor(i * valid_fraction)``: the same documents whenever it is run, in one pass. A single
    document gives its tail instead, cut at a blank line, else at a line, after ``1 - valid_fraction`` of it.

    All files appear under their names when all are complete; until then nothing of earlier ones is touched, and a
    failure leaves nothing.

    Raises ``UserError`` for unreadable input, an unusable tokenizer, nothing to write on either side, and where
    another process prepares data of the same name.
    """
    check_share(job.valid_fraction)
    check_tokenizer(job.tokenizer)
    check_outputs(job.output, job.valid_fraction, job.tokenizer, inputs)
    tokenizer, tally = _tokenizer(job), Tally()
    documents = read_documents(inputs, job.reading, tokenizer if job.reading.chat else None, tally)
    outputs = outputs_of(job.output, job.valid_fraction)
    with contextlib.ExitStack() as stack:
        for prefix in dict.fromkeys((job.output, *outputs)):
            stack.enter_context(locked(beside(prefix), "prepare-data"))
        folder = stack.enter_context(private_folder(job.output))
        writers = [TokenWriter(folder, prefix, vocab_size(tokenizer)) for prefix in outputs]
        for writer in writers:
            stack.callback(writer.close)
        if job.valid_fraction is None:
            routed = ((document, 0) for document in documents)
        else:
            routed = _route(documents, job.valid_fraction)
        _write(routed, writers, tokenizer, job, tally)
        if job.tokenizer == BYTES:
            _save(tokenizer, folder / "tokenizer", tokenizer_of(job.output))
        return Prepared(tuple(publish(writers)), tally)


def _tokenizer(job: Job) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer() if job.tokenizer == BYTES else load_tokenizer(job.tokenizer)
    if job.append_eos and tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {job.tokenizer}: has no eos token to end documents; use --no-eos")
    if job.reading.chat and tokenizer.chat_template is None:
        raise UserError(f"tokenizer {job.tokenizer}: has no chat template; add chat_template.jinja to it")
    return tokenizer


def _write(
    routed: Iterable[tuple[Document, int]],
    writers: Sequence[TokenWriter],
    tokenizer: PreTrainedTokenizerFast,
    job: Job,
    tally: Tally,
) -> None:
    eos = np.array([tokenizer.eos_token_id] if job.append_eos else [], np.int32)
    for batch in _batches(routed):
        rows = encode_batch(tokenizer, [document.text for document, _ in batch])
        for (document, side), ids in zip(batch, rows, strict=True):
            if ids.size:  # a normalising tokenizer may leave nothing of a blank text
                writers[side].add(_closed(ids, eos))
            else:
                tally.add("no tokens", document.where)
        if job.progress is not None:
            job.progress(sum(document.source_bytes for document, _ in batch))
    for writer in writers:
        writer.finish()


def _closed(ids: np.ndarray, eos: np.ndarray) -> np.ndarray:
    # A chat template may have written the eos already.
    return ids if eos.size and ids[-1] == eos[0] else np.concatenate([ids, eos])


def _save(tokenizer: PreTrainedTokenizerFast, written: Path, folder: Path) -> None:
    """Put a tokenizer's directory in the place of an older one."""
    tokenizer.save_pretrained(written)
    if folder.exists():
        os.rename(folder, written.with_name("replaced"))
    os.rename(written, folder)


def _route(documents: Iterator[Document], valid_fraction: float) -> Iterator[tuple[Document, int]]:
    """Each document with 0 for training or 1 for validation."""
    first = list(islice(documents, 2))
    if len(first) == 1:
        head, tail = _cut_tail(first[0].text, valid_fraction)
        yield replace(first[0], text=head), 0
        yield Document(tail, 0, first[0].where), 1
        return
    for i, document in enumerate(chain(first, documents)):
        yield document, int((i + 1) * valid_fraction) - int(i * valid_fraction)


def _cut_tail(text: str, fraction: float) -> tuple[str, str]:
    """Two non-empty halves whose sum is ``text``; the second is about ``fraction`` of it."""
    if len(text) < 2:
        raise UserError("one document of one character cannot be split; leave out --valid-fraction")
    target = min(max(int(len(text) * (1.0 - fraction)), 1), len(text) - 1)
    for separator in ("\n\n", "\n"):
        at = text.find(separator, target) + len(separator)
        if len(separator) <= at < len(text):
            return text[:at], text[at:]
    return text[:target], text[target:]


def _batches(routed: Iterable[tuple[Document, int]]) -> Iterator[list[tuple[Document, int]]]:
    batch: list[tuple[Document, int]] = []
    characters = 0
    for item in routed:
        batch.append(item)
        characters += len(item[0].text)
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
