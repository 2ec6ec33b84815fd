"""Cut a submodel out of a model, or permute a model, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from ..cost.sizes import parent_fields
from ..ops.gather import gather_tensor
from ..ops.locate import locate
from ..space import ElasticSpace, ParentShape, SubmodelSpec, TensorLayout

# ``orders["hidden_size"]`` is global; ``orders[layer, axis]`` belongs to one layer and may be a list of orders, one
# an expert, for ``moe_ffn_hidden_size`` (channels are independent between experts). An order lists old positions.
Orders = Mapping[str | tuple[int, str], Sequence[int]]


def slice_state(
    space: ElasticSpace, spec: SubmodelSpec, state: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a submodel from those of the parent, one at a time (bounded memory).

    Kept layers and experts are renumbered from 0; a tensor keeps its name otherwise.
    """
    parent = space.parent
    layers = {old: new for new, old in enumerate(space.kept_layers(spec))}
    for name, tensor in state:
        layer, layout, expert = locate(parent, name)
        if layer is not None and layer not in layers:
            continue
        kept = {a: space.kept(a, w) for a, w in space.layer_sizes(spec, layer).items()}
        if expert is not None and "num_moe_experts" in kept:
            if expert not in kept["num_moe_experts"]:
                continue
            name = _renumber(name, layout, expert, kept["num_moe_experts"].index(expert))
        if layer is not None:
            name = name.replace(f"decoder.layers.{layer}.", f"decoder.layers.{layers[layer]}.", 1)
        yield name, gather_tensor(tensor, layout, parent_fields(parent), kept)


def permute_state(
    parent: ParentShape, orders: Orders, state: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The same model with its components in another order."""
    for name, tensor in state:
        layer, layout, expert = locate(parent, name)
        order = orders.get((layer, "num_moe_experts")) if layer is not None else None
        if expert is not None and order is not None:
            name = _renumber(name, layout, expert, list(order).index(expert))
        yield name, gather_tensor(tensor, layout, parent_fields(parent), orders_in(orders, layer, expert))


def orders_in(orders: Orders, layer: int | None, expert: int | None) -> dict[str, Sequence[int]]:
    """The orders along the dimensions of one tensor, by axis; an expert's place among others is not one of them."""
    found: dict[str, Sequence[int]] = {}
    if "hidden_size" in orders:
        found["hidden_size"] = orders["hidden_size"]
    for key, order in orders.items():
        if (
            isinstance(key, tuple)
            and key[0] == layer
            and not (expert is not None and key[1] == "num_moe_experts")
        ):
            of_expert = expert is not None and not isinstance(order[0], int)
            found[key[1]] = order[expert] if of_expert else order  # type: ignore[index]
    return found


def _renumber(name: str, layout: TensorLayout, old: int, new: int) -> str:
    for template in (layout.name, *layout.aliases):
        if name.endswith(template.format(e=old)):
            return name.removesuffix(template.format(e=old)) + template.format(e=new)
    raise AssertionError(name)
