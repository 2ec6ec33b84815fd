"""Memory of sliced execution: weights that a submodel cannot read where they lie are copied (``blocks.cuts``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from ..space import ElasticSpace, SubmodelSpec, tensors_of
from .parallel import Layout, size_of
from .sizes import parent_fields

SHARED_BY_TENSOR_RANKS = (
    "mamba_num_heads", "mamba_num_groups", "num_attention_heads", "num_query_groups", "ffn_hidden_size",
    "moe_shared_expert_intermediate_size", "vocab_size",
)  # fmt: skip

_ROUTER = "mlp.router.weight"


@dataclass(frozen=True)
class Submodels:
    """What the micro-batches of a step run, each on its own widths.

    Args:
        dense: must rows of a matrix lie one after the other, as Transformer Engine's kernels take them? Those of the
            moe_router's must in any case.
    """

    space: ElasticSpace
    specs: frozenset[SubmodelSpec]
    dense: bool = True

    def copied(self, parallel: Layout, layers: Iterable[int]) -> float:
        """Numbers that a rank copies between its optimiser steps, of these layers of the parent.

        None where the lanes cannot be shared: that layout is refused elsewhere.
        """
        pattern = self.space.parent.hybrid_layer_pattern
        ranks = _Ranks(parallel.tensor, size_of(parallel, "expert_tensor"), parallel.expert)
        return sum(
            _copied(self.space, pattern[i], tuple(self.space.layer_sizes(spec, i).items()), ranks, self.dense)
            for spec in self.specs - {self.space.full()}
            for i in layers
            if i in self.space.kept_layers(spec)
        )


@dataclass(frozen=True)
class _Ranks:
    tensor: int
    expert_tensor: int
    expert: int

    def of(self, field: str) -> int:
        """Ranks that share what a field counts, inside a tensor."""
        if field == "moe_ffn_hidden_size":
            return self.expert_tensor
        return self.tensor if field in SHARED_BY_TENSOR_RANKS else 1


@lru_cache(maxsize=1024)
def _copied(
    space: ElasticSpace, symbol: str, widths: tuple[tuple[str, int], ...], ranks: _Ranks, dense: bool
) -> int:
    """Of one layer with these widths."""
    if any(space.lanes_of(a) % ranks.of(a) or (a == "num_moe_experts" and space.lanes_of(a) % ranks.expert)
           for a, _ in widths):  # fmt: skip
        return 0
    whole = parent_fields(space.parent)
    sizes = {field: size // ranks.of(field) for field, size in whole.items()}
    kept = {a: space.kept(a, width, ranks.of(a)) for a, width in widths}
    experts = dict(widths).get("num_moe_experts", space.parent.num_moe_experts) // ranks.expert
    total = 0
    for layout in tensors_of(symbol, whole):
        extents = layout.shape(sizes)
        places = [layout.gather(dim, sizes, kept) or range(n) for dim, n in enumerate(extents)]
        scattered = any(list(place) != list(range(len(place))) for place in places)
        narrowed = any(len(place) < n for place, n in zip(places[1:], extents[1:], strict=True))
        if scattered or (narrowed and (dense or layout.name == _ROUTER)):
            total += prod(len(place) for place in places) * (experts if layout.per_expert else 1)
    return total
