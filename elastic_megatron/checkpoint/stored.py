"""A model as it lies in files: every tensor of it, by Megatron's name, readable by rows.

A file format differs from a Megatron module in where it keeps the rows of a tensor: Hugging Face keeps q, k and v
apart, ``torch_dist`` stacks the experts of a layer and splits ``in_proj``. ``Piece`` is that fact, per tensor; reading,
writing and converting are copies of rows between the pieces of two formats. Nothing here builds a model.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..cost.sizes import parent_fields
from ..quantization.formats import Part
from ..space import ParentShape, TensorLayout, ends, tensors_of
from .hf_keys import hf_keys
from .hf_quantised import Quantised
from .manifest import Manifest

# of weights that are not quantised
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


@dataclass(frozen=True)
class ModelTensor:
    """One tensor of a model, in the order of Megatron's module.

    Args:
        layout: its entry in the fact table.
        sizes: the sizes that its layout reads, of its own layer.
        layer, expert: whose it is; ``None`` outside layers and experts.
        part: which of the tensors that are stored of a quantised weight; ``None`` for a weight as it is.
    """

    layout: TensorLayout
    sizes: Mapping[str, int] = field(repr=False, hash=False)
    layer: int | None = None
    expert: int | None = None
    part: Part | None = None

    @property
    def name(self) -> str:
        """As a module built from the local spec spells it."""
        name = self.prefixed("decoder.layers", self.layout.name)
        return name if self.part is None else self.part.renamed(name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a part that is one number, how many tensors Hugging Face keeps the rows of the weight in."""
        shape = self.layout.shape(self.sizes)
        if self.part is None:
            return shape
        if not self.part.columns:
            return (len(hf_keys(self.layout)),)
        return (shape[0], shape[1] // self.part.columns)

    def prefixed(self, layers: str, local: str) -> str:
        """``local``, a name inside this tensor's layer, as a name inside the model; ``{e}`` becomes the expert."""
        local = local.format(e=self.expert)
        return local if self.layer is None else f"{layers}.{self.layer}.{local}"


def model_tensors(
    shape: ParentShape, layer_sizes: Mapping[int, Mapping[str, int]] | None = None
) -> Iterator[ModelTensor]:
    """Every tensor of a model, in its order.

    Args:
        layer_sizes: for layers that differ from ``shape``, the sizes that do.
    """
    sizes = parent_fields(shape)
    for layout in ends(shape.tie_embeddings):
        yield ModelTensor(layout, sizes)
    for layer, symbol in enumerate(shape.hybrid_layer_pattern):
        own = {**sizes, **(layer_sizes or {}).get(layer, {})}
        for layout in tensors_of(symbol, own):
            for e in range(own["num_moe_experts"]) if layout.per_expert else (None,):
                yield ModelTensor(layout, own, layer, e)


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one tensor of a file: ``rows`` of them from ``start``.

    Rows run along dimension 0; where a file stacks the tensors of all experts, along the first two.
    """

    key: str
    start: int
    rows: int


@dataclass(frozen=True)
class Entry:
    """What the header of a file says about one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def as_stored(tensor: ModelTensor, quantised: Quantised | None) -> tuple[ModelTensor, ...]:
    """The tensors that are stored of one: its parts where it is quantised, else itself."""
    if quantised is None or not quantised.stores(tensor.layout, tensor.layer, tensor.expert):
        return (tensor,)
    return tuple(replace(tensor, part=part) for part in quantised.format.parts)


def quantised_weights(shape: ParentShape, quantised: Quantised) -> dict[str, ModelTensor]:
    """The tensors of a model that are stored in parts, by name."""
    return {t.name: t for t in model_tensors(shape) if quantised.stores(t.layout, t.layer, t.expert)}


def stored_shapes(
    tensors: Iterable[ModelTensor], pieces: Callable[[ModelTensor], tuple[Piece, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in files that hold these; stacked experts with their rows one after another."""
    rows: dict[str, int] = {}
    tails: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        for piece in pieces(tensor):
            rows[piece.key] = rows.get(piece.key, 0) + piece.rows
            tails[piece.key] = tensor.shape[1:]
    return {key: (n, *tails[key]) for key, n in rows.items()}


class Files(Protocol):
    """The tensors of some files, as they lie there."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Every tensor, by key."""
        ...

    def read(self, key: str, start: int, out: Tensor) -> None:
        """Fill ``out`` with rows from ``start``; several threads may read at once.

        Args:
            out: contiguous, on the CPU, of the entry's dtype; its size tells how many rows.

        Raises ``UserError`` that names the file where it is shorter than its header says, or cannot be read.
        """
        ...

    def reread(self) -> Files:
        """The same files, read by the library of their format instead of by our code."""
        ...


@dataclass(frozen=True)
class StoredModel:
    """A model in files, opened and checked but not read.

    Args:
        manifest: what is known of it besides its weights.
        files: where the weights are.
        pieces: the rows of a tensor, in order.
        side_files: the directory with tokenizer and other files that an export takes along, if there is one.
        quantised: how weights are stored; ``None`` where they are what they are.
        notes: a line for each thing in the files that is not part of the model.
    """

    path: Path
    manifest: Manifest
    files: Files
    pieces: Callable[[ModelTensor], tuple[Piece, ...]]
    side_files: Path | None = None
    quantised: Quantised | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def tensors(self) -> dict[str, ModelTensor]:
        """What is stored, by name."""
        whole = model_tensors(self.manifest.shape)
        return {t.name: t for weight in whole for t in as_stored(weight, self.quantised)}

    def dtypes(self, tensor: ModelTensor) -> dict[str, torch.dtype]:
        """Of each tensor of the files that holds rows of this one: a merged adapter may have changed some of them."""
        return {piece.key: self.files.entries[piece.key].dtype for piece in self.pieces(tensor)}

    def dtype(self, tensor: ModelTensor) -> torch.dtype:
        """The smallest that holds every number of it: where its pieces have several, what torch promotes them to."""
        return reduce(torch.promote_types, self.dtypes(tensor).values())

    def rows(self, tensor: ModelTensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor, in a new tensor of its dtype."""
        stop = tensor.shape[0] if stop is None else stop
        out = torch.empty((stop - start, *tensor.shape[1:]), dtype=self.dtype(tensor))
        row = 0
        for piece in self.pieces(tensor):
            first, last = max(start, row), min(stop, row + piece.rows)
            if first < last:
                self._read(piece.key, piece.start + first - row, out[first - start : last - start])
            row += piece.rows
        return out

    def _read(self, key: str, start: int, out: Tensor) -> None:
        """Fill ``out`` with rows of a tensor of the files, whatever dtype they have there."""
        dtype = self.files.entries[key].dtype
        if dtype == out.dtype:
            return self.files.read(key, start, out)
        own = torch.empty(out.shape, dtype=dtype)
        self.files.read(key, start, own)
        out.copy_(own)

    def state(self, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(Megatron name, whole tensor), one at a time; only those of the names ``wanted`` where given."""
        for name, tensor in self.tensors.items():
            if wanted is None or name in wanted:
                yield name, self.rows(tensor)


@dataclass(frozen=True)
class Memory:
    """Tensors in memory, as ``Files``."""

    state: Mapping[str, Tensor]

    @cached_property
    def entries(self) -> Mapping[str, Entry]:
        return {name: Entry(tuple(t.shape), t.dtype) for name, t in self.state.items()}

    def read(self, key: str, start: int, out: Tensor) -> None:
        out.copy_(self.state[key][start : start + len(out)])

    def reread(self) -> Memory:
        return self


def in_memory(manifest: Manifest, state: Mapping[str, Tensor]) -> StoredModel:
    """A state dict under Megatron's names as a stored model."""

    def pieces(tensor: ModelTensor) -> tuple[Piece, ...]:
        return (Piece(tensor.name, 0, tensor.shape[0]),)

    return StoredModel(Path("(memory)"), manifest, Memory(state), pieces)
