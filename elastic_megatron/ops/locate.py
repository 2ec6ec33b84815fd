"""Which tensor of the fact table a parameter of a Megatron module is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from torch import Tensor

from ..cost.sizes import parent_fields
from ..errors import UserError
from ..space import ParentShape, TensorLayout, ends, tensors_of

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"\{e\}")


@cache
def _patterns(parent: ParentShape, symbol: str) -> tuple[tuple[re.Pattern[str], TensorLayout], ...]:
    fields = parent_fields(parent)
    return tuple(
        (re.compile(_EXPERT.sub(r"(\\d+)", re.escape(name).replace(r"\{e\}", "{e}"))), layout)
        for layout in tensors_of(symbol, fields)
        for name in (layout.name, *layout.aliases)
    )


def locate(parent: ParentShape, name: str) -> tuple[int | None, TensorLayout, int | None]:
    """(layer, layout, expert) of a parameter name of a Megatron module.

    Raises ``UserError`` for a tensor the fact table does not know: nothing is dropped in silence.
    """
    if match := _LAYER.fullmatch(name):
        layer = int(match[1])
        if layer < parent.num_layers:
            for pattern, layout in _patterns(parent, parent.hybrid_layer_pattern[layer]):
                if found := pattern.fullmatch(match[2]):
                    return layer, layout, int(found[1]) if found.groups() else None
    else:
        for layout in ends(parent.tie_embeddings):
            if name in (layout.name, *layout.aliases):
                return None, layout, None
    raise UserError(f"tensor {name!r} belongs to no block of pattern {parent.hybrid_layer_pattern!r}")


def weights(model_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a module's state dict that belong to the model: no extra states, no budget router."""
    return {
        k: v
        for k, v in model_state.items()
        if isinstance(v, Tensor) and "_extra_state" not in k and not k.startswith("budget_router.")
    }
