"""A quantised model layer by layer: which weights are stored in blocks, which layers are left alone. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..cost.sizes import parent_fields
from ..quantization.presets import Block, block_of
from ..recipe import Recipe
from ..space import ElasticSpace, ParentShape, SubmodelSpec, TensorLayout, tensors_of
from .hf_quantised import Quantised, quantisable
from .quantised_plan import planned_by


def block_weights(quantised: Quantised, shape: ParentShape) -> tuple[TensorLayout, ...]:
    """The linears of a model that are quantised in some layer, one of each name; none where nothing ties columns."""
    if quantised.format.block == 1:
        return ()
    return tuple({layout.name: layout for _, layout, _ in quantised.stored_keys(shape)}.values())


def left_alone(quantised: Quantised, shape: ParentShape) -> dict[Block, list[int]]:
    """Layers of a model in which some linear is not quantised, by the block that it belongs to."""
    stored = {(layer, layout.name, expert) for layer, layout, expert in quantised.stored_keys(shape)}
    sizes, found = parent_fields(shape), dict[Block, list[int]]()
    for layer, symbol in enumerate(shape.hybrid_layer_pattern):
        for layout in filter(quantisable, tensors_of(symbol, sizes)):
            experts = range(shape.num_moe_experts) if layout.per_expert else (None,)
            layers = found.setdefault(block_of(symbol, layout.name), [])
            if layer not in layers and any((layer, layout.name, e) not in stored for e in experts):
                layers.append(layer)
    return {block: layers for block, layers in found.items() if layers}


def checked_of(recipe: Recipe, shape: ParentShape, *, frozen: bool) -> dict[str, Any]:
    """What ``cost.setting.Setting`` holds of a recipe's section ``quantize``; nothing without one.

    Args:
        frozen: are the widths those of a trained family?

    Raises ``UserError`` as ``planned_by``.
    """
    if recipe.quantize is None:
        return {"frozen": frozen}
    quantised = planned_by(recipe.quantize, shape)
    return {
        "frozen": frozen,
        "blocks": quantised.format.block,
        "quantised": block_weights(quantised, shape),
        "calibration": recipe.quantize,
        "section": "quantize",
    }


def why_apart(
    recipe: Recipe, shape: ParentShape, quantised: Quantised, *, elastic: bool, frozen: bool
) -> str | None:
    """Why a quantised model is made of norms, linears and experts that are modules of their own.

    ``None`` where norms may be fused into linears, and experts grouped: where every submodel runs on its own widths,
    so that nothing is scaled between a norm and the rounding of a linear's input.

    Args:
        elastic: does it have submodels?
        frozen: are their widths those of a trained family?
    """
    if elastic and not frozen:
        return "router.frozen is false, and the router's choices are masks"
    if elastic and (masked := [s.name for s in recipe.stages if s.execution == "masked"]):
        return f"stage {masked[0]} has execution: masked"
    tensor, keys = recipe.parallel.tensor, shape.num_query_groups
    if elastic and "*" in shape.hybrid_layer_pattern and keys % tensor:
        return f"parallel.tensor is {tensor}, and {keys} KV heads cannot be cut by it"
    stored = quantised.stored_keys(shape)
    experts = Counter((layer, layout.name) for layer, layout, expert in stored if expert is not None)
    for (layer, _), count in experts.items():
        if count != shape.num_moe_experts:
            return f"quantize.keep leaves some experts of layer {layer} alone"
    return None


def in_use(space: ElasticSpace, submodels: Iterable[SubmodelSpec]) -> ElasticSpace:
    """The space with only those widths that some of these submodels has, and the whole model's."""
    used = {axis: {space.parent.size(axis)} for axis in space.axes}
    for spec in submodels:
        for axis in spec:
            width = spec[axis]
            used[axis] |= set(width) if isinstance(width, tuple) else {width}
    choices = ((axis, tuple(w for w in widths if w in used[axis])) for axis, widths in space.choices)
    return replace(space, choices=tuple(choices))
