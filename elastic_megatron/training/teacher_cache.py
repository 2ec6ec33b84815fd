"""What a frozen teacher says of every sequence, kept on disk, so that it says it once.

A record holds the ``top_k`` most probable entries at every position of one sequence and what is left to all others. It
is found by a digest of the sequence's token ids: whichever run, rank or step meets the same sequence again finds it.
With a cache the loss is always that of these k + 1 outcomes, as they are stored, also where the teacher was just asked.
So it does not depend on what the cache holds, and a run that is resumed goes on as if it had not stopped.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import runtime
from ..checkpoint import integrity
from ..checkpoint.agreement import same_on_all_ranks
from ..checkpoint.source import Source
from ..data.blend import hash_file
from ..data.record_files import KEY_BYTES, Records, listing
from ..errors import UserError
from ..files.json_files import read_object, write_object
from ..files.lock import locked, within
from ..ops.chunked_kd import Projection
from ..ops.parallel import zigzag, zigzag_order
from ..ops.top_block import TopLogits
from ..ops.top_logits import top_logits
from ..recipe import Recipe
from ..recipe.objective import CACHE_HEADER, cached_bytes

_FORMAT = 1
_PATIENCE_SECONDS = 60.0


class TeacherCache:
    """The cache of one run, as it was when the run began; what the run adds is for later ones.

    Ranks find the same records, as rank 0 listed them, and all of them check a record before they use it.

    Args:
        top_k: entries that a record has for a position.
        temperature: of the softmax whose log-probabilities they have.
        chunk: tokens whose logits exist at a time, as in the loss.
        only: there is no teacher that could be asked.
    """

    def __init__(
        self, records: Records, *, top_k: int, temperature: float, chunk: int | None, only: bool
    ) -> None:
        self.records, self.top_k, self.temperature, self.chunk = records, top_k, temperature, chunk
        self.only = only
        self._full = False

    @classmethod
    def open(cls, recipe: Recipe, teacher: Source) -> TeacherCache:
        """The cache that ``recipe.teacher`` names, made where there is none; collective.

        Raises ``UserError`` on all ranks where the folder belongs to another teacher, or to other entries of it.
        """
        folder, loss = recipe.teacher.cache, recipe.loss
        assert folder is not None
        vocabulary = teacher.manifest.shape.vocab_size
        top_k = min(recipe.teacher.top_k, vocabulary)
        listed: list[Any] = [None]
        with same_on_all_ranks(f"teacher.cache {folder} cannot be read or written"):
            if torch.distributed.get_rank() == 0:
                _claim(folder, {
                    "format": _FORMAT, "teacher": digest(teacher.path), "dtype": recipe.model.dtype,
                    "vocabulary": vocabulary, "top_k": top_k, "temperature": loss.temperature,
                })  # fmt: skip
                listed = [listing(folder)]
        torch.distributed.broadcast_object_list(listed)
        records = Records(folder, listed[0])
        only = recipe.teacher.cache_only
        return cls(records, top_k=top_k, temperature=loss.temperature, chunk=loss.chunk, only=only)

    def lesson(self, tokens: Tensor) -> Lesson:
        """What is known of whole sequences [b, s], which lie on the CPU.

        Raises ``UserError`` where something is not, and there is no teacher to ask.
        """
        keys, size = [key_of(row) for row in tokens], self.record_bytes(tokens.shape[1])
        found = Lesson(self, tokens.shape[1], keys, [self.records.get(key, size) for key in keys])
        if self.only and not found.known:
            raise UserError(self.lacks("a sequence that this step trains on"))
        return found

    def lists(self, tokens: Tensor) -> bool:
        """Is there a record of a sequence [s]? Its bytes are not looked at."""
        return (key_of(tokens), self.record_bytes(len(tokens))) in self.records

    def lacks(self, what: str) -> str:
        """One line about records that are not there."""
        return (
            f"teacher.cache {self.records.folder} lacks {what}, or its record is damaged, and teacher.cache_only "
            "leaves nobody to ask; train once with teacher.cache_only=false on the same data, seq_length and seed"
        )

    def record_bytes(self, length: int) -> int:
        """Bytes of what is stored of a sequence."""
        return cached_bytes(length, self.top_k)

    def write(self, key: bytes, parts: Sequence[np.ndarray]) -> None:
        """Store a record. Where the disk refuses, the run goes on without writing, and says so once."""
        if self._full:
            return
        try:
            self.records.append(key, parts)
        except OSError as e:
            self._full = True
            print(
                f"teacher.cache {self.records.folder} cannot be written ({e.strerror}); training goes on, but nothing "
                "more is stored",
                file=sys.stderr,
            )


@dataclass(frozen=True)
class Lesson:
    """What the cache knows of the sequences of a micro-batch.

    Args:
        length: tokens of a sequence, over all context-parallel ranks.
        keys, rows: digest and record of every sequence, ``None`` where there is none.
    """

    cache: TeacherCache
    length: int
    keys: Sequence[bytes]
    rows: Sequence[np.ndarray | None]

    @property
    def known(self) -> bool:
        """Is every sequence known, so that the teacher need not run?"""
        return all(row is not None for row in self.rows)

    def recalled(self, device: torch.device) -> TopLogits:
        """What the teacher once said: ``[b, s / context, ...]``."""
        context, length, k = runtime.groups().cp, self.length, self.cache.top_k
        ends = np.cumsum([4 * length * k, 4 * length, 2 * length * k])
        rows = np.stack([row for row in self.rows if row is not None])
        shapes = (np.int32, (length, k)), (np.float32, (length,)), (np.float16, (length, k))
        parts = [
            torch.from_numpy(np.ascontiguousarray(part).view(dtype).reshape(len(rows), *shape))
            for part, (dtype, shape) in zip(np.split(rows, ends[:-1], axis=1), shapes, strict=True)
        ]
        own = {str(i): zigzag(part, 1, context.rank(), context.size()) for i, part in enumerate(parts)}
        return TopLogits.unpacked(*runtime.sent(own, device).values())

    def noted(self, teacher: Projection) -> TopLogits:
        """What the teacher says now, as it is stored; one of the ranks that hear it stores what was not known.

        Collective over tensor- and context-parallel ranks.
        """
        cache, groups = self.cache, runtime.groups()
        top = top_logits(
            teacher, cache.top_k, temperature=cache.temperature, group=groups.tp, chunk=cache.chunk
        )
        packed = top.packed()
        whole = [_whole_sequences(part, groups.cp) for part in packed]
        if groups.tp.rank() == 0 and groups.cp.rank() == 0:
            parts = [part.cpu().numpy() for part in whole]
            for index, (key, row) in enumerate(zip(self.keys, self.rows, strict=True)):
                said = [part[index] for part in parts]
                if row is None and not any(np.isnan(part).any() for part in said):  # else it is asked again
                    cache.write(key, said)
        return TopLogits.unpacked(*packed)


def key_of(tokens: Tensor) -> bytes:
    """Digest of a sequence [s] of token ids."""
    ids = np.ascontiguousarray(tokens.numpy().astype("<i4"))
    return hashlib.blake2b(ids.tobytes(), digest_size=KEY_BYTES).digest()


def digest(folder: Path) -> str:
    """Hex digest of a model's files, of a checkpoint or Hugging Face directory.

    Of ``integrity.json`` where there is one, which has a digest of every file; else of the weights and ``config.json``,
    of files above 16 MiB their sizes and 64 blocks of 16 KiB.
    """
    sealed = (folder / integrity.FILE).exists()
    names = [integrity.FILE] if sealed else ["config.json", "*.safetensors", "*.distcp"]
    files = sorted(path for name in names for path in folder.glob(name))
    assert files, f"{folder} holds no model"
    found = hashlib.blake2b(digest_size=KEY_BYTES)
    for path in files:
        found.update(path.name.encode())
        hash_file(found, path)
    return found.hexdigest()


def _claim(folder: Path, header: dict[str, Any]) -> None:
    """Leave the header in a new folder; raise ``UserError`` where there is another one."""
    file = folder / CACHE_HEADER
    if not file.exists():
        with locked(within(folder), "train", _PATIENCE_SECONDS):
            if not file.exists():  # else it is another run's, which was faster
                write_object(file, header)
    again = "name another teacher.cache, or remove this folder: it can be made again"
    found = read_object(file, again, again)
    for name, value in header.items():
        if found.get(name) != value:
            raise UserError(
                f"teacher.cache {folder} is of {name} {found.get(name)}, but this run has {value}; name another folder"
            )


def _whole_sequences(part: Tensor, context: torch.distributed.ProcessGroup) -> Tensor:
    """Sequences [b, s, ...] of which every context-parallel rank has its part [b, s / context, ...]."""
    if context.size() == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(context.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=context)
    together = torch.cat(parts, 1)
    whole = torch.empty_like(together)
    whole[:, zigzag_order(whole.shape[1], context.size()).to(whole.device)] = together
    return whole
