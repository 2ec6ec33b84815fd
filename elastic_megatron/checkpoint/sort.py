"""Sort a model by a ranking: the function stays, the best components move to the front of every lane."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..importance import Ranking
from ..space import ElasticSpace, stored_order
from .shards import renumber, shards
from .slice import Orders, orders_in


def sort_orders(space: ElasticSpace, ranking: Ranking) -> Orders:
    """The stored order of every elastic width, as ``permute_state`` takes it.

    Routed experts' channels get a list of orders, one an expert, by the expert's number *before* sorting.

    Raises ``UserError`` where the ranking belongs to another model or lacks an axis of the space.
    """
    orders: dict[str | tuple[int, str], Sequence[int]] = {}
    for axis in space.axes:
        if axis == "num_layers":
            continue
        if axis == "hidden_size":
            orders[axis] = _dealt(space, ranking, axis, axis)
        for layer in space.layers(axis):
            orders[layer, axis] = _dealt(space, ranking, axis, f"layers.{layer}.{axis}")
    return orders


def sort_space(space: ElasticSpace, ranking: Ranking) -> ElasticSpace:
    """The space of the sorted model: where depth is elastic, layers are dropped in the ranking's order.

    Layers keep their places; only the order in which depth drops them is part of the space.
    """
    if "num_layers" not in space.axes:
        return space
    return space.with_layer_order(_order(space, ranking, "num_layers", "num_layers").tolist())


@torch.no_grad()
def sort_model(chunks: Sequence[Any], space: ElasticSpace, ranking: Ranking) -> None:
    """Sort a model in place, tile by tile, under the layout it is sharded by; collective.

    Needs the memory of the orders and of a few tiles (``shards.TILE``), however large the model and its tensors are,
    and no rank ever holds more of the model than its own.

    Args:
        chunks: this rank's pipeline chunks, bare, of a model of shape ``space.parent``.

    Raises ``UserError`` as ``sort_orders``.
    """
    orders = sort_orders(space, ranking)
    for chunk in chunks:
        experts: dict[tuple[int, str], list[Tensor]] = {}
        for shard in shards(chunk, space.parent):
            shard.permute(orders_in(orders, shard.layer, shard.expert))
            if (
                shard.layer is not None
                and (shard.layer, "num_moe_experts") in orders
                and shard.expert is not None
            ):
                experts.setdefault((shard.layer, shard.layout.name), []).append(shard.tensor)
        # an expert's channels are in order now, and it may go to its place, on whichever rank that is
        for (layer, _), own in experts.items():
            renumber(own, orders[layer, "num_moe_experts"], chunk.pg_collection.ep)


def _dealt(space: ElasticSpace, ranking: Ranking, axis: str, key: str) -> Any:
    order, lanes, groups = _order(space, ranking, axis, key), space.lanes_of(axis), space.parent.groups(axis)

    # all experts' channels are millions of numbers, which as objects take five times the memory
    def stored(ranked: Tensor) -> Sequence[int]:
        return array("q", stored_order(ranked.tolist(), lanes, groups))

    return [stored(of_expert) for of_expert in order] if axis == "moe_ffn_hidden_size" else stored(order)


def _order(space: ElasticSpace, ranking: Ranking, axis: str, key: str) -> Tensor:
    pattern, size = space.parent.hybrid_layer_pattern, space.parent.size(axis)
    if ranking.layer_types != pattern:
        raise UserError(
            f"the ranking is of a model {ranking.layer_types!r}, not {pattern!r}; rank this model"
        )
    if key not in ranking.orders:
        raise UserError(f"the ranking lacks {key}, but {axis} is elastic; rank again with that axis")
    order = ranking.orders[key]
    if order.shape[-1] != size:
        raise UserError(f"the ranking of {key} has {order.shape[-1]} components, not {size}; rank this model")
    return order
