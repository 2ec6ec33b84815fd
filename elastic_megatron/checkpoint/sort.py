"""Sort a model by a ranking: the function stays, the best components move to the front of every lane."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from ..errors import UserError
from ..importance import Ranking
from ..space import ElasticSpace, stored_order
from .slice import permute_state

Orders = dict[str | tuple[int, str], Sequence[int]]


def sort_orders(space: ElasticSpace, ranking: Ranking) -> Orders:
    """The stored order of every elastic width, as ``permute_state`` takes it.

    Routed experts' channels get a list of orders, one an expert, by the expert's number *before* sorting:
    ``permute_state`` looks them up by the name a tensor comes with, so both permutations compose.

    Raises ``UserError`` where the ranking belongs to another model or lacks an axis of the space.
    """
    orders: Orders = {}
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
    return space.with_layer_order(_order(space, ranking, "num_layers", "num_layers"))


def sorted_state(
    space: ElasticSpace, ranking: Ranking, state: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The same model, sorted, tensor by tensor. Raises ``UserError`` as ``sort_orders``."""
    return permute_state(space.parent, sort_orders(space, ranking), state)


def _dealt(space: ElasticSpace, ranking: Ranking, axis: str, key: str) -> list:
    order, lanes, groups = _order(space, ranking, axis, key), space.lanes_of(axis), space.parent.groups(axis)
    if axis == "moe_ffn_hidden_size":
        return [stored_order(of_expert, lanes, groups) for of_expert in order]
    return stored_order(order, lanes, groups)


def _order(space: ElasticSpace, ranking: Ranking, axis: str, key: str) -> list:
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
    return order.tolist()
