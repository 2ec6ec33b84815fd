"""What a ``torch_dist`` checkpoint keeps beside its tensors, read as data: nothing of it runs.

Megatron's own reader loads the same object, but imports all of Megatron for it, and refuses types that its release
does not know; what is not known here is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.reading import inside
from .dist_metadata import DistMetadata, read_metadata, reading
from .raw import RawFiles
from .torch_archive import Archive, Stretch
from .torch_objects import DESCRIPTIONS

GIVE_CONFIG = "give --config HF_DIR, the Hugging Face directory of the model"
KEY, LEGACY = "common_state/shard_0_1", "common.pt"
_EMBEDDINGS = tuple(f"{p}embedding.word_embeddings.weight" for p in ("", "module.", "model."))


class UnreadableError(UserError):
    """A checkpoint describes its model, in a form that cannot be read."""


@dataclass(frozen=True)
class DistState:
    """What a checkpoint folder says beside its tensors, read once it is needed."""

    folder: Path

    @cached_property
    def metadata(self) -> DistMetadata:
        return read_metadata(self.folder)

    @property
    def rows(self) -> int:
        """Of the embedding, padding included. Raises ``UserError`` where there is none."""
        for key in _EMBEDDINGS:
            if key in self.metadata.tensors and (size := self.metadata.tensors[key].size):
                return size[0]
        raise UserError(f"{self.folder}: tensor {_EMBEDDINGS[0]!r} is missing; copy the checkpoint again")

    def common(self) -> Any:
        """The common state: a dict; ``None`` where there is none.

        Raises ``UnreadableError`` where it is damaged, and ``UserError`` where reading it with torch would run code.
        """
        file, start, length = self.folder / LEGACY, 0, 0
        if file.exists():
            file = inside(self.folder, LEGACY, self.folder)
            length = file.stat().st_size
        elif KEY in self.metadata.objects:
            place = self.metadata.place(KEY)
            file, start, length = self.metadata.file(place), place.offset, place.length
        else:
            return None
        with reading(file, f"copy it again, or {GIVE_CONFIG}", UnreadableError):
            found = Archive(Stretch(RawFiles(), file, start, length)).load(DESCRIPTIONS)
            return found[0] if isinstance(found, list) else found
