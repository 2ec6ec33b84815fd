"""Where the tensors of a submodel lie in those of the whole model, on one rank, by the fact table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..cost.sizes import parent_fields
from ..cost.sliced_memory import SHARED_BY_TENSOR_RANKS
from ..ops.locate import locate, weights
from ..space import ElasticSpace, SubmodelSpec, TensorLayout

Alike = Callable[[nn.Module, nn.Module, tuple[int, int] | None], None]
Key = tuple[int | None, TensorLayout, int | None]  # layer of the parent, layout, this rank's expert


@dataclass(frozen=True)
class Cut:
    """Where a submodel's tensor lies in the whole one, on this rank, by dimension; a prefix is an ``int``.

    ``dense``: whoever reads it takes rows to lie one after the other.
    """

    dims: tuple[tuple[int, int | Tensor], ...]
    dense: bool = False

    def of(self, whole: Tensor) -> Tensor:
        for dim, kept in self.dims:
            whole = whole.narrow(dim, 0, kept) if isinstance(kept, int) else whole.index_select(dim, kept)
        return whole.contiguous() if self.dense else whole

    def empty(self, whole: Tensor) -> Tensor:
        """As ``of`` in type and shape, without the memory."""
        shape = list(whole.shape)
        for dim, kept in self.dims:
            shape[dim] = kept if isinstance(kept, int) else len(kept)
        return whole.new_empty(1).expand(shape)

    def add(self, part: Tensor, whole: Tensor) -> None:
        """Add ``part`` to where it lies in ``whole``."""
        scattered = [(dim, kept) for dim, kept in self.dims if not isinstance(kept, int)]
        assert len(scattered) < 2, "no tensor has lanes along two dimensions"
        for dim, kept in self.dims:
            if isinstance(kept, int):
                whole = whole.narrow(dim, 0, kept)
        if scattered:
            whole.index_add_(*scattered[0], part.to(whole.dtype))
        else:
            whole.add_(part)


class Cuts:
    """Cuts of this rank's tensors, by the fact table."""

    def __init__(self, whole: Any, space: ElasticSpace, spec: SubmodelSpec) -> None:
        groups = whole.pg_collection
        self.space, self.spec = space, spec
        self.tensor, self.expert_tensor, self.expert = (
            g.size() for g in (groups.tp, groups.expt_tp, groups.ep)
        )
        sizes = parent_fields(space.parent)
        self.sizes = {field: size // self._ranks(field) for field, size in sizes.items()}
        self.sources = {key: (tensor, holder) for key, tensor, holder in _tensors(whole, space)}
        self.device = next(whole.parameters()).device

    def of(self, model: Any, alike: Alike | None) -> Iterator[tuple[Tensor, Tensor, Cut]]:
        """(the submodel's tensor, the whole model's, the cut) of everything that a submodel has."""
        for (layer, layout, expert), part, holder in _tensors(model, self.space):
            experts = None
            if expert is not None:
                experts = expert, self._kept("num_moe_experts", layer, self.expert)[expert]
            source, original = self.sources[layer, layout, experts and experts[1]]
            if alike is not None:
                alike(holder, original, experts)
            yield part, source, replace(self._cut(layer, layout, source), dense=not _takes_strides(holder))

    def experts(self, layer: int) -> Cut:
        """Of a vector over all experts of a layer."""
        return _cut(
            [(0, self._kept("num_moe_experts", layer))], (self.space.parent.num_moe_experts,), self.device
        )

    def _cut(self, layer: int | None, layout: TensorLayout, source: Tensor) -> Cut:
        kept = {a: self._kept(a, layer, self._ranks(a)) for a in self.space.layer_sizes(self.spec, layer)}
        places = ((dim, layout.gather(dim, self.sizes, kept)) for dim in range(source.dim()))
        return _cut([(dim, p) for dim, p in places if p is not None], tuple(source.shape), self.device)

    def _kept(self, name: str, layer: int | None, ranks: int = 1) -> list[int]:
        widths = self.space.layer_sizes(self.spec, layer)
        return self.space.kept(name, widths.get(name, self.space.parent.size(name)), ranks)

    def _ranks(self, field: str) -> int:
        if field == "moe_ffn_hidden_size":
            return self.expert_tensor
        return self.tensor if field in SHARED_BY_TENSOR_RANKS else 1


def _takes_strides(holder: nn.Module) -> bool:
    """May the rows of this module's weights lie apart?

    Those of Megatron's own linears, which call torch. Transformer Engine hands pointers and sizes to its kernels, also
    from modules that are not its own: the moe_router's GEMM is one of its kernels wherever it can be imported.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding

    return isinstance(holder, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding)


def _cut(places: list[tuple[int, list[int]]], shape: tuple[int, ...], device: torch.device) -> Cut:
    dims: list[tuple[int, int | Tensor]] = []
    for dim, kept in places:
        prefix = kept == list(range(len(kept)))
        if not prefix:
            dims.append((dim, torch.tensor(kept, device=device)))
        elif len(kept) < shape[dim]:
            dims.append((dim, len(kept)))
    # prefixes first: a copy is made of what they leave
    return Cut(tuple(sorted(dims, key=lambda d: not isinstance(d[1], int))))


def _tensors(model: Any, space: ElasticSpace) -> Iterator[tuple[Key, Tensor, nn.Module]]:
    """(which one of the whole model, tensor, module that holds it) of everything in a chunk."""
    parent = space.parent
    numbers = {str(i): layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    for local, tensor in weights(model.state_dict(keep_vars=True)).items():
        name = local
        match local.split(".", 3):
            case ["decoder", "layers", index, rest]:
                name = f"decoder.layers.{numbers[index]}.{rest}"
            case ["output_layer", "weight"] if parent.tie_embeddings:
                name = "embedding.word_embeddings.weight"
        yield locate(parent, name), tensor, model.get_submodule(local.rpartition(".")[0])
