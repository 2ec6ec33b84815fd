"""A quantised model as the numbers that it stands for, computed as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ..quantization.formats import WEIGHT, WEIGHT_SCALE, Format, Part
from ..quantization.packing import dequantise
from .stored import Entry, Files, StoredModel

# codes and fp32 values of these many rows of a weight are in memory besides the rows asked for
_VALUES = 4 << 20


def dequantised(stored: StoredModel) -> StoredModel:
    """The same model, its weights in the dtype of its embedding; itself where it is not quantised.

    A weight is code times scales in fp32, rounded once: what fake quantisation in that dtype trained with. What the
    weights are multiplied with is not quantised.
    """
    if stored.quantised is None:
        return stored
    dtype = stored.dtype(next(iter(stored.tensors.values())))
    return replace(stored, files=_Dequantised(stored.files, stored.quantised.format, dtype), quantised=None)


class _Dequantised:
    """``Files`` without scales, and with the weights they belong to as numbers."""

    def __init__(self, files: Files, form: Format, dtype: torch.dtype) -> None:
        self._files, self._form, self._dtype = files, form, dtype

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        """As ``Files.entries``."""
        found = dict(self._files.entries)
        for key in [k for k in found if self._packed(k)]:
            names = {part: part.renamed(key) for part in self._form.parts}
            rows, columns = found[key].shape
            for name in names.values():
                del found[name]
            found[key] = Entry((rows, columns * self._form.parts[0].columns), self._dtype)
        return found

    def read(self, key: str, start: int, out: Tensor) -> None:
        """As ``Files.read``."""
        if not self._packed(key):
            return self._files.read(key, start, out)
        step = max(1, _VALUES // out.shape[1])
        scalars = {p.suffix: self._rows(p, key, 0, 1)[0] for p in self._form.parts if not p.columns}
        for first in range(0, len(out), step):
            part_of = out[first : first + step]
            rows = {
                p.suffix: self._rows(p, key, start + first, len(part_of))
                for p in self._form.parts
                if p.columns
            }
            part_of.copy_(dequantise(self._form, rows | scalars, self._dtype))

    def reread(self) -> _Dequantised:
        """As ``Files.reread``, of codes and scales."""
        return _Dequantised(self._files.reread(), self._form, self._dtype)

    def _packed(self, key: str) -> bool:
        return key.endswith("." + WEIGHT) and key.removesuffix(WEIGHT) + WEIGHT_SCALE in self._files.entries

    def _rows(self, part: Part, key: str, start: int, n: int) -> Tensor:
        name = part.renamed(key)
        entry = self._files.entries[name]
        out = torch.empty((n, *entry.shape[1:]), dtype=entry.dtype)
        self._files.read(name, start, out)
        return out
