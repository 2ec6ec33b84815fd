"""A checkpoint of a quantised model as what will be stored of it, computed as it is read.

Training keeps weights in high precision and rounds them at every step; here they are rounded for good. So exports and
slices of such a checkpoint are streamed as those of any other, and of any layout that wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from ..quantization.formats import INPUT_SCALE, Part
from ..quantization.packing import part_rows, scalars
from .amax import Amax
from .hf_keys import hf_keys
from .hf_quantised import Quantised
from .stored import Entry, ModelTensor, Piece, StoredModel, quantised_weights

# values of a weight that are in memory at once, besides the rows asked for
_VALUES = 1 << 20


def packed(stored: StoredModel, quantised: Quantised, amax: Mapping[str, Amax]) -> StoredModel:
    """The same model, its weights stored in a format: the inverse of ``dequantised``.

    The parts of a weight are computed each for itself, from rows that are read for each. Of NVFP4 that is the scales
    of blocks twice, a fifth of the work; FP8 has one part.

    Args:
        stored: the weights as training left them.
        quantised: how they will be stored.
        amax: by name of the whole weight.
    """
    weights = quantised_weights(stored.manifest.shape, quantised)
    files = _Packed(stored, quantised, weights, amax)
    manifest = replace(stored.manifest, quantised=None)
    return replace(stored, manifest=manifest, files=files, pieces=files.pieces, quantised=quantised)


class _Packed:
    """``Files`` with the parts of quantised weights, by Megatron's names, and the other tensors as they lie."""

    def __init__(
        self,
        stored: StoredModel,
        quantised: Quantised,
        weights: Mapping[str, ModelTensor],
        amax: Mapping[str, Amax],
    ) -> None:
        self._stored, self._quantised, self._weights, self._amax = stored, quantised, weights, amax
        self._form = quantised.format
        self._parts = {
            part.renamed(name): (weight, part)
            for name, weight in weights.items()
            for part in self._form.parts
        }

    def pieces(self, tensor: ModelTensor) -> tuple[Piece, ...]:
        """The rows of a tensor, in order; of a number as many as Hugging Face keeps of it, all the same one."""
        if tensor.name not in self._parts:
            return self._stored.pieces(tensor)
        part = tensor.part
        if part is not None and not part.columns:
            return (Piece(tensor.name, 0, 1),) * len(hf_keys(tensor.layout))
        return (Piece(tensor.name, 0, tensor.shape[0]),)

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        """As ``Files.entries``."""
        found: dict[str, Entry] = {}
        for name, tensor in self._stored.tensors.items():
            if name not in self._weights:
                found |= {p.key: self._stored.files.entries[p.key] for p in self._stored.pieces(tensor)}
        for name, (weight, part) in self._parts.items():
            found[name] = Entry(self._shape(weight, part), getattr(torch, part.dtype))
        return found

    def read(self, key: str, start: int, out: Tensor) -> None:
        """As ``Files.read``."""
        if key not in self._parts:
            return self._stored.files.read(key, start, out)
        weight, part = self._parts[key]
        amax = self._amax[weight.name]
        if not part.columns:
            out.fill_(scalars(self._form, *amax)[part.suffix].item())
            return None
        step = max(1, _VALUES // weight.shape[1])
        for first in range(0, len(out), step):
            part_of = out[first : first + step]
            rows = self._stored.rows(weight, start + first, start + first + len(part_of))
            part_of.copy_(part_rows(self._form, part, rows, amax.weight))
        return None

    def reread(self) -> _Packed:
        """As ``Files.reread``, of the weights that are packed."""
        again = replace(self._stored, files=self._stored.files.reread())
        return _Packed(again, self._quantised, self._weights, self._amax)

    def _shape(self, weight: ModelTensor, part: Part) -> tuple[int, ...]:
        """ModelOpt's exporter writes numbers as [], but the scale of FP8 inputs as [1]."""
        if part.columns:
            return (weight.shape[0], weight.shape[1] // part.columns)
        return (1,) if part.suffix == INPUT_SCALE and self._form.block == 1 else ()
