"""Elastic models in Megatron-Bridge: what its ``HybridModelProvider`` takes as ``hybrid_stack_spec``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec

from .. import runtime
from ..blocks import elastic_hybrid_stack_spec
from ..checkpoint.manifest import FILE, Manifest
from ..checkpoint.resolve import elastic_space, parent_manifest
from ..checkpoint.tracker import resolve
from ..errors import UserError
from ..recipe import load
from ..space import ElasticSpace
from .shape import check_same, parent_shape


def hybrid_stack_spec(source: str | Path | ElasticSpace) -> partial[ModuleSpec]:
    """A value for ``provider.hybrid_stack_spec``: called with the provider, it returns the elastic stack's spec.

    It is a ``functools.partial`` of ``elastic_stack_spec`` over plain values: it can be pickled, and Bridge
    writes it to its YAML by the dotted name and reads it back (where ``elastic_megatron.`` is an allowed target).

    Args:
        source: a recipe file, a checkpoint (run folder, root or ``iter_*`` folder) or a space.

    Raises ``UserError`` where the source is missing or damaged, or describes no elastic model.
    """
    space = source if isinstance(source, ElasticSpace) else _space(Path(source))
    return partial(elastic_stack_spec, space=space.to_dict())


def elastic_stack_spec(provider: Any, space: Mapping[str, Any]) -> ModuleSpec:
    """The elastic stack's spec for a ``HybridModelProvider``.

    Args:
        space: ``ElasticSpace.to_dict()``.

    Raises ``UserError`` where the provider's model is not the parent of the space, or not of the Nemotron-H
    family, or runs on a stack that is not elastic.
    """
    if provider.restore_modelopt_state or provider.transformer_impl == "inference_optimized":
        raise UserError(
            "restore_modelopt_state and transformer_impl='inference_optimized' ask for stacks of their own, which "
            "are not elastic; unset them"
        )
    whole = ElasticSpace.from_dict(space)
    check_same(parent_shape(provider), whole.parent, "the provider", "the parent of the elastic space")
    return elastic_hybrid_stack_spec(whole, runtime.hybrid_stack_spec())


def _space(path: Path) -> ElasticSpace:
    if path.is_file():
        recipe = load(path)
        space = elastic_space(recipe, parent_manifest(recipe))
    else:
        space = Manifest.read(resolve(path) / FILE).space
    if space is None:
        raise UserError(f"{path} describes a model that is not elastic; give a recipe with space.choices")
    return space
