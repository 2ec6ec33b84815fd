"""Registration through ``ModuleSpec``: the elastic stack, and heterogeneous sliced stacks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

from ..space import ElasticSpace, ParentShape
from .mixers import ElasticMambaMixer, ElasticTopKRouter
from .stack import ElasticHybridStack


def elastic_hybrid_stack_spec(space: ElasticSpace, stock: ModuleSpec) -> ModuleSpec:
    """A stock hybrid stack spec (TE or local) made elastic; plugs into ``HybridModel`` and Megatron-Bridge.

    Only three modules change: the stack, Mamba's mixer and the moe_router. Every other leaf stays what
    ``stock`` says. Raises ``ValueError`` where ``stock`` already replaces one of the three.
    """
    _expect(stock.module, HybridStack)
    spec = copy.deepcopy(stock)
    spec.module = ElasticHybridStack
    spec.params = {**(spec.params or {}), "space": space}
    mixer = spec.submodules.mamba_layer.submodules.mixer
    _expect(mixer.module, MambaMixer)
    mixer.module = ElasticMambaMixer
    moe = spec.submodules.moe_layer.submodules
    assert isinstance(moe.mlp, partial) and moe.mlp.func is MoELayer, "MoE specs are partial(MoELayer)"
    submodules = copy.copy(moe.mlp.keywords["submodules"])
    _expect(submodules.router, TopKRouter)
    submodules.router = ElasticTopKRouter
    moe.mlp = partial(MoELayer, **{**moe.mlp.keywords, "submodules": submodules})
    return spec


def with_mamba_sizes(stock: ModuleSpec, parent: ParentShape) -> ModuleSpec:
    """A stack spec whose Mamba mixers convolve and chunk as the parent does: Megatron's config has no such fields."""
    spec = copy.deepcopy(stock)
    mixer = spec.submodules.mamba_layer.submodules.mixer
    mixer.params = {
        **(mixer.params or {}),
        "d_conv": parent.conv_kernel,
        "chunk_size": parent.mamba_chunk_size,
    }
    return spec


def sliced_stack_spec(
    stock: ModuleSpec, layers: Sequence[Mapping[str, int]], numbers: Sequence[int] | None = None
) -> ModuleSpec:
    """A stock spec whose i-th layer is built with the config overrides ``layers[i]``.

    This is how a submodel whose widths differ between layers becomes a plain model of its own.

    Args:
        numbers: of the layers, from 0, where they keep those that they have in the parent.
    """
    spec = copy.deepcopy(stock)
    for name in ("mamba_layer", "attention_layer", "mlp_layer", "moe_layer"):
        layer = getattr(spec.submodules, name)
        layer.module = _with_overrides(layer.module, layers, numbers or range(len(layers)))
    return spec


def _with_overrides(module: type, layers: Sequence[Mapping[str, int]], numbers: Sequence[int]) -> type:
    class PerLayer(module):
        def __init__(self, config: Any, *args: Any, layer_number: int = 1, **kwargs: Any) -> None:
            config = copy.copy(config)
            for field, value in layers[layer_number - 1].items():
                setattr(config, field, value)
            super().__init__(config, *args, layer_number=numbers[layer_number - 1] + 1, **kwargs)

    PerLayer.__name__ = PerLayer.__qualname__ = f"PerLayer{module.__name__}"
    return PerLayer


def _expect(found: Any, stock: type) -> None:
    if found is not stock:
        raise ValueError(
            f"the spec uses {getattr(found, '__name__', found)} where the elastic one extends {stock.__name__}; "
            "pass the stock hybrid stack spec"
        )
