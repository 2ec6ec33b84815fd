"""Which modules a student is made of, and whether its submodels run on their own widths."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .. import runtime
from ..blocks import SlicedModel, elastic_stack
from ..checkpoint.hf_quantised import Quantised
from ..checkpoint.quantised_layers import why_apart
from ..errors import UserError
from ..recipe import Recipe
from ..space import ElasticSpace, ParentShape
from .quantizers import round_alike

_logger = logging.getLogger(__name__)


def leaves(
    recipe: Recipe,
    shape: ParentShape,
    space: ElasticSpace | None,
    quantised: Quantised | None,
    *,
    frozen: bool,
) -> Any:
    """The layer spec of a student: Transformer Engine's modules where they are installed and may be used.

    A quantised one that must be masked has local ones: a norm that is fused into a linear would have its output scaled
    to the kept width after the linear's input was rounded, not before.
    """
    best = runtime.hybrid_stack_spec()
    why = quantised and why_apart(recipe, shape, quantised, elastic=space is not None, frozen=frozen)
    if not why:
        return best
    if runtime.has_transformer_engine() and torch.distributed.get_rank() == 0:
        _logger.warning("quantised on Megatron's own linears, not on Transformer Engine's: %s", why)
    return runtime.hybrid_stack_spec("local")


def sliced_models(recipe: Recipe, chunks: Sequence[nn.Module], spec: Any) -> list[SlicedModel] | None:
    """The submodels of elastic chunks that are quantised, on their own widths; ``None`` where they must be masked."""
    space = elastic_stack(chunks[0]).space
    if not can_be_sliced(recipe, space):
        return None
    return [SlicedModel(chunk, spec, alike=round_alike) for chunk in chunks]


def can_be_sliced(recipe: Recipe, space: ElasticSpace) -> bool:
    """May submodels run on their own widths? Raises ``UserError`` where a stage insists and they cannot."""
    if recipe.stages and all(stage.execution == "masked" for stage in recipe.stages):
        return False
    tensor, keys = runtime.groups().tp.size(), space.parent.num_query_groups
    if "*" not in space.parent.hybrid_layer_pattern or keys % tensor == 0:
        return True
    if any(stage.execution == "sliced" for stage in recipe.stages):
        raise UserError(
            f"execution 'sliced' needs whole KV heads on every rank, but parallel.tensor is {tensor} and the model has "
            f"{keys}; write execution: auto, or parallel.tensor={keys}"
        )
    return False
