"""One ``.bin/.idx`` pair, written in a folder of its own and put in place once it is whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from elastic_megatron.errors import UserError
from elastic_megatron.files.writing import sync_folder


@dataclass(frozen=True)
class PrepareReport:
    """One data set on disk: ``tokens`` include the eos of each document, ``sha256`` is that of the .bin."""

    prefix: str
    documents: int
    tokens: int
    vocab_size: int
    dtype: str
    sha256: str


class TokenWriter:
    """Takes the documents of one data set, in order.

    Args:
        folder: a private one on the disk of the prefix; what is left in it is the caller's to remove.
    """

    def __init__(self, folder: Path, prefix: Path, vocab_size: int) -> None:
        self._folder, self._prefix, self._vocab_size = folder, prefix, vocab_size
        self._dtype = DType.optimal_dtype(vocab_size)
        self._builder = IndexedDatasetBuilder(str(self._written(".bin")), dtype=self._dtype)
        self._sha256 = hashlib.sha256()
        self._documents = self._tokens = 0

    def add(self, ids: np.ndarray) -> None:
        self._builder.add_item(torch.from_numpy(ids))
        self._builder.end_document()
        self._sha256.update(ids.astype(self._dtype).tobytes())
        self._documents += 1
        self._tokens += ids.size

    def finish(self) -> None:
        """Write the index, and wait until both files are on the disk. Raises ``UserError`` without documents."""
        if not self._documents:
            raise UserError(f"{self._prefix}: no documents to write; give more input or split it otherwise")
        self._builder.finalize(str(self._written(".idx")))
        for suffix in (".bin", ".idx"):
            with self._written(suffix).open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        self._builder.data_file.close()  # pyright: ignore[reportAttributeAccessIssue]

    def _written(self, suffix: str) -> Path:
        return self._folder / f"{self._prefix.name}{suffix}"

    def final(self, suffix: str) -> Path:
        """A file of the data set under its own name."""
        return self._prefix.with_name(f"{self._prefix.name}{suffix}")

    def place(self, suffix: str) -> None:
        os.replace(self._written(suffix), self.final(suffix))

    def report(self) -> PrepareReport:
        return PrepareReport(
            prefix=str(self._prefix),
            documents=self._documents,
            tokens=self._tokens,
            vocab_size=self._vocab_size,
            dtype=np.dtype(self._dtype).name,
            sha256=self._sha256.hexdigest(),
        )


def publish(writers: Sequence[TokenWriter]) -> list[PrepareReport]:
    """Give finished data sets their names.

    The .idx go first and come last: an interrupted overwrite leaves missing files, not pairs whose halves, or
    splits whose sides, disagree.
    """
    for writer in writers:
        writer.final(".idx").unlink(missing_ok=True)
    for suffix in (".bin", ".idx"):
        for writer in writers:
            writer.place(suffix)
            sync_folder(writer.final(suffix).parent)
    return [writer.report() for writer in writers]
