"""What a ``torch_dist`` checkpoint keeps beside its tensors, read without Megatron.

Megatron's own reader loads the same object, but imports all of Megatron for it, and refuses types that its release
does not know.
"""

from __future__ import annotations

import io
import pickle
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata

from ..errors import UserError

GIVE_CONFIG = "give --config HF_DIR, the Hugging Face directory of the model"
_KEY, _LEGACY = "common_state/shard_0_1", "common.pt"
_EMBEDDINGS = tuple(f"{p}embedding.word_embeddings.weight" for p in ("", "module.", "model."))
_PLAIN = {("argparse", "Namespace"): Namespace, ("collections", "OrderedDict"): OrderedDict}


class UnreadableError(UserError):
    """A checkpoint describes its model, in a form that cannot be read."""


@dataclass(frozen=True)
class DistMetadata:
    """``.metadata`` of a checkpoint folder, read once it is needed."""

    folder: Path

    @cached_property
    def content(self) -> Metadata:
        try:
            return FileSystemReader(self.folder).read_metadata()
        except Exception as e:  # damaged pickles raise all kinds
            file = self.folder / ".metadata"
            raise UserError(f"{file} cannot be read ({type(e).__name__}: {e}); copy it again") from None

    @property
    def rows(self) -> int:
        """Of the embedding, padding included. Raises ``UserError`` where there is none."""
        tensors: Mapping[str, Any] = self.content.state_dict_metadata
        for key in _EMBEDDINGS:
            if key in tensors:
                return tensors[key].size[0]
        raise UserError(f"{self.folder}: tensor {_EMBEDDINGS[0]!r} is missing; copy the checkpoint again")

    def common(self) -> Any:
        """The common state: a dict; ``None`` where there is none.

        Raises ``UnreadableError`` where it is damaged.
        """
        file = self.folder / _LEGACY
        try:
            if file.exists():
                with file.open("rb") as f:
                    return load_plain(f)
            for index, where in (self.content.storage_data or {}).items():
                if index.fqn == _KEY:
                    file = self.folder / where.relative_path
                    with file.open("rb") as f:
                        f.seek(where.offset)
                        found = load_plain(io.BytesIO(f.read(where.length)))
                    return found[0] if isinstance(found, list) else found
        except UserError:
            raise
        except Exception as e:  # as above
            raise UnreadableError(
                f"{file}: the common state cannot be read ({type(e).__name__}: {e}); copy it again, or {GIVE_CONFIG}"
            ) from None
        return None


class _Inert:
    """Stands for every object of a pickle that is no plain data; nothing is imported for it and nothing runs."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self

    def _ignore(self, *args: Any, **kwargs: Any) -> None: ...

    __init__ = __setstate__ = __setitem__ = append = extend = add = _ignore


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return _PLAIN.get((module, name), _Inert)


def load_plain(file: BinaryIO) -> Any:
    """What ``torch.save`` wrote; all but dicts, lists, numbers, strings and namespaces is inert."""
    module: Any = SimpleNamespace(Unpickler=_PlainUnpickler, __name__="plain_pickle")
    return torch.load(file, map_location="cpu", pickle_module=module, weights_only=False)
