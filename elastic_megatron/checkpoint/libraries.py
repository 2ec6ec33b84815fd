"""Tensors of files read by the libraries of their formats, as ``Files``.

For checks of what the row readers read and the sinks wrote: nothing of their code is used here. What it costs: a
safetensors file is mapped, and of a ``torch_dist`` checkpoint a whole tensor is in memory, the experts of a layer
among them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from .stored import Entry

# pages of a mapping count as memory of the process until it is closed
_MAPPED = 256 << 20
# whole tensors of a checkpoint that are kept: the one that is read, and the one before, for threads that lag behind
_KEPT = 2


class LibrarySafetensors:
    """Safetensors files through ``safe_open``; for several threads at once. ``rename`` as in ``SafetensorsFiles``."""

    def __init__(self, files: Iterable[Path], rename: Callable[[str], str] = str) -> None:
        self.entries: dict[str, Entry] = {}
        self._stored: dict[str, str] = {}
        self.where: dict[str, Path] = {}
        self._own = threading.local()
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for stored in opened.keys():  # noqa: SIM118
                    tensor, key = opened.get_tensor(stored), rename(stored)
                    self.entries[key], self.where[key] = Entry(tuple(tensor.shape), tensor.dtype), file
                    self._stored[key] = stored

    def read(self, key: str, start: int, out: Tensor) -> None:
        """As ``Files.read``."""
        tensor = self._opened(self.where[key], out.nbytes).get_tensor(self._stored[key])
        assert tensor.dtype == out.dtype, key
        out.copy_(tensor[start : start + len(out)] if tensor.dim() else tensor.expand(out.shape))

    def reread(self) -> LibrarySafetensors:
        """As ``Files.reread``."""
        return self

    def _opened(self, file: Path, more: int) -> safe_open:
        """This thread's mapping of a file, closed and opened again now and then."""
        opened, name, mapped = getattr(self._own, "opened", (None, None, 0))
        if opened is None or name != file or mapped > _MAPPED:
            opened, mapped = safe_open(file, framework="pt"), 0
        self._own.opened = opened, file, mapped + more
        return opened


class LibraryTorchDist:
    """A ``torch_dist`` folder through ``torch.distributed.checkpoint.load``; for several threads at once.

    Args:
        folder: its ``.metadata`` is unpickled by torch: one that was written here, or was read safely before.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = _Reader(folder)
        items = self._reader.read_metadata().state_dict_metadata.items()
        self.entries = {
            key: Entry(tuple(item.size), item.properties.dtype)
            for key, item in items
            if isinstance(item, TensorStorageMetadata)
        }
        self._whole: OrderedDict[str, Tensor] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, key: str, start: int, out: Tensor) -> None:
        """As ``Files.read``."""
        whole = self._loaded(key)
        assert whole.dtype == out.dtype, key
        out.copy_(whole.reshape(-1, *out.shape[1:])[start : start + len(out)])

    def reread(self) -> LibraryTorchDist:
        """As ``Files.reread``."""
        return self

    def _loaded(self, key: str) -> Tensor:
        with self._lock:
            if key not in self._whole:
                while len(self._whole) >= _KEPT:
                    self._whole.popitem(last=False)
                entry = self.entries[key]
                state = {key: torch.empty(entry.shape, dtype=entry.dtype)}
                dcp.load(state, storage_reader=self._reader, no_dist=True)
                self._whole[key] = state[key]
            return self._whole[key]


class _Reader(dcp.FileSystemReader):
    """Torch's reader asks for the metadata at each load."""

    _once: Metadata | None = None

    def read_metadata(self, *args: object, **kwargs: object) -> Metadata:
        if self._once is None:
            self._once = super().read_metadata()
        return self._once
