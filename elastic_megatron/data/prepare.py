"""Text, JSON lines and chats to Megatron token files.

``PREFIX.bin`` is every token of every document, one after another; ``PREFIX.idx`` says where documents
begin (``megatron/core/datasets/indexed_dataset.py``).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from transformers import PreTrainedTokenizerFast

from elastic_megatron.data.documents import Document, check_inputs, read_documents
from elastic_megatron.data.tokenizer import encode_batch, load_tokenizer, vocab_size
from elastic_megatron.errors import UserError

# Enough for all cores of the tokenizer to be busy, little enough to hold in memory.
_BATCH_DOCUMENTS = 1024
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class PrepareReport:
    """One data set on disk: ``tokens`` include the eos of each document, ``sha256`` is that of the .bin."""

    prefix: str
    documents: int
    tokens: int
    vocab_size: int
    dtype: str
    sha256: str


def prepare(
    inputs: Sequence[Path],
    output: Path,
    tokenizer_dir: Path,
    *,
    json_key: str = "text",
    append_eos: bool = True,
    chat: bool = False,
    progress: Callable[[int], None] | None = None,
) -> PrepareReport:
    """Write all documents of ``inputs`` to ``output.bin`` and ``output.idx``.

    Documents are those of ``documents.read_documents``; each is tokenised whole and, with ``append_eos``,
    ends with exactly one eos. ``progress`` is called with the bytes of input done since the last call.
    The files appear under their names only when complete.

    Raises ``UserError`` for unreadable input, an unusable tokenizer, or nothing to write.
    """
    job = _Job.start(inputs, tokenizer_dir, json_key, append_eos, chat)
    routed = ((document, 0) for document in job.documents)
    return job.write(routed, [output], progress)[0]


def prepare_split(
    inputs: Sequence[Path],
    output: Path,
    tokenizer_dir: Path,
    *,
    valid_fraction: float,
    json_key: str = "text",
    append_eos: bool = True,
    chat: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[PrepareReport, PrepareReport]:
    """As ``prepare``, to ``output_train`` and ``output_valid``; reports in that order.

    Validation takes documents at an even stride, the i-th where ``floor((i + 1) * valid_fraction)``
    exceeds ``floor(i * valid_fraction)``: the same documents whenever it is run, in one pass. A single
    document gives its tail instead, cut at a blank line, else at a line, after ``1 - valid_fraction`` of it.

    Raises ``UserError`` as ``prepare``, and if either side would be empty.
    """
    if not 0.0 < valid_fraction < 1.0:
        raise UserError(f"--valid-fraction {valid_fraction}: must lie between 0 and 1; for example 0.05")
    job = _Job.start(inputs, tokenizer_dir, json_key, append_eos, chat)
    outputs = [Path(f"{output}_train"), Path(f"{output}_valid")]
    train, valid = job.write(_route(job.documents, valid_fraction), outputs, progress)
    return train, valid


def _route(documents: Iterator[Document], valid_fraction: float) -> Iterator[tuple[Document, int]]:
    """Each document with 0 for training or 1 for validation."""
    first = list(islice(documents, 2))
    if len(first) == 1:
        head, tail = _cut_tail(first[0].text, valid_fraction)
        yield Document(head, first[0].source_bytes), 0
        yield Document(tail, 0), 1
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


@dataclass(frozen=True)
class _Job:
    """What ``prepare`` and ``prepare_split`` share: checked input, the tokenizer, the closing token."""

    documents: Iterator[Document]
    tokenizer: PreTrainedTokenizerFast
    eos: np.ndarray

    @classmethod
    def start(
        cls, inputs: Sequence[Path], tokenizer_dir: Path, json_key: str, append_eos: bool, chat: bool
    ) -> _Job:
        check_inputs(inputs, chat=chat)
        tokenizer = load_tokenizer(tokenizer_dir)
        if append_eos and tokenizer.eos_token_id is None:
            raise UserError(f"tokenizer {tokenizer_dir}: has no eos token to end documents; use --no-eos")
        if chat and tokenizer.chat_template is None:
            raise UserError(f"tokenizer {tokenizer_dir}: has no chat template; add chat_template.jinja to it")
        documents = read_documents(inputs, json_key=json_key, chat_tokenizer=tokenizer if chat else None)
        return cls(documents, tokenizer, np.array([tokenizer.eos_token_id] if append_eos else [], np.int32))

    def write(
        self,
        routed: Iterable[tuple[Document, int]],
        outputs: Sequence[Path],
        progress: Callable[[int], None] | None,
    ) -> list[PrepareReport]:
        """Tokenise ``routed`` documents into the output that each names; all outputs appear, or none."""
        size = vocab_size(self.tokenizer)
        writers = [_Writer(path, size) for path in outputs]
        try:
            for batch in _batches(routed):
                rows = encode_batch(self.tokenizer, [document.text for document, _ in batch])
                for (_, side), ids in zip(batch, rows, strict=True):
                    if ids.size:  # a normalising tokenizer may leave nothing of a blank text
                        writers[side].add(self._closed(ids))
                if progress is not None:
                    progress(sum(document.source_bytes for document, _ in batch))
            for writer in writers:
                writer.finish()
            return [writer.publish() for writer in writers]
        finally:
            for writer in writers:
                writer.discard()

    def _closed(self, ids: np.ndarray) -> np.ndarray:
        # A chat template may have written the eos already.
        if self.eos.size and ids[-1] == self.eos[0]:
            return ids
        return np.concatenate([ids, self.eos])


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


class _Writer:
    """One .bin/.idx pair, under temporary names beside the final ones until ``publish``."""

    def __init__(self, prefix: Path, size: int) -> None:
        self._prefix = prefix
        self._vocab_size = size
        self._dtype = DType.optimal_dtype(size)
        self._temporary = f"{prefix}.tmp{os.getpid()}"
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._builder = IndexedDatasetBuilder(f"{self._temporary}.bin", dtype=self._dtype)
        self._sha256 = hashlib.sha256()
        self._documents = 0
        self._tokens = 0

    def add(self, ids: np.ndarray) -> None:
        self._builder.add_item(torch.from_numpy(ids))
        self._builder.end_document()
        self._sha256.update(ids.astype(self._dtype).tobytes())
        self._documents += 1
        self._tokens += ids.size

    def finish(self) -> None:
        if not self._documents:
            raise UserError(f"{self._prefix}: no documents to write; give more input or split it otherwise")
        self._builder.finalize(f"{self._temporary}.idx")

    def publish(self) -> PrepareReport:
        # The .idx goes first and comes last: an interrupted overwrite leaves a missing file, not a
        # pair whose halves disagree.
        Path(f"{self._prefix}.idx").unlink(missing_ok=True)
        for suffix in (".bin", ".idx"):
            os.replace(f"{self._temporary}{suffix}", f"{self._prefix}{suffix}")
        return PrepareReport(
            prefix=str(self._prefix),
            documents=self._documents,
            tokens=self._tokens,
            vocab_size=self._vocab_size,
            dtype=np.dtype(self._dtype).name,
            sha256=self._sha256.hexdigest(),
        )

    def discard(self) -> None:
        """Remove what was not published; nothing after ``publish``."""
        self._builder.data_file.close()  # pyright: ignore[reportAttributeAccessIssue]
        for suffix in (".bin", ".idx"):
            Path(f"{self._temporary}{suffix}").unlink(missing_ok=True)
