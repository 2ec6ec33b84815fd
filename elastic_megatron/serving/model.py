"""A built model that computes what will be served of a source."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from .. import runtime
from ..blocks import build_elastic_model, build_model, running
from ..checkpoint.manifest import Manifest
from ..checkpoint.source import Source
from ..ops.mix import SubmodelMix
from ..space import ElasticSpace


def space_of(manifest: Manifest) -> ElasticSpace | None:
    """The space of a model that has submodels."""
    return manifest.space if manifest.submodels else None


def build_served(source: Source) -> nn.Module:
    """The model of a source, whole on this process's device and filled, in evaluation mode.

    It computes what kernels will of the files inside ``source.served([model])``. Raises ``UserError`` where the files
    are damaged.
    """
    runtime.start()
    # Transformer Engine's linears round nothing before their fused norms
    spec = None if source.inputs is None else runtime.hybrid_stack_spec("local")
    shape, space = source.manifest.shape, space_of(source.manifest)
    model = build_model(shape, spec=spec) if space is None else build_elastic_model(space, spec=spec)
    source.fill([model])
    return model.eval()


def running_submodel(model: nn.Module, manifest: Manifest, name: str | None) -> AbstractContextManager[None]:
    """Inside, the model of ``build_served`` is this submodel; the whole of it for ``None``.

    Raises ``UserError`` listing the names there are.
    """
    if name is None:
        return nullcontext()
    spec, space = manifest.submodel(name), space_of(manifest)
    assert space is not None, "a manifest with submodels has a space"
    if spec == space.full():
        return nullcontext()
    return running(model, SubmodelMix.one_hot(space, spec, next(model.parameters()).device))
