"""A model that computes what will be served of a source, and its submodels on their own widths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from .. import runtime
from ..blocks import SlicedModel, build_elastic_model, build_model
from ..checkpoint.manifest import Manifest
from ..checkpoint.source import Source
from ..ops.mix import SubmodelMix
from ..quantization.inputs import round_alike
from ..space import ElasticSpace


def space_of(manifest: Manifest) -> ElasticSpace | None:
    """The space of a model that has submodels."""
    return manifest.space if manifest.submodels else None


@dataclass(frozen=True)
class Served:
    """A source as it will be served.

    Args:
        model: whole on this process's device and filled, in evaluation mode.
        submodels: cut out of it, where it has any.
    """

    source: Source
    model: nn.Module
    submodels: SlicedModel | None

    @contextmanager
    def running(self, name: str | None) -> Iterator[nn.Module]:
        """A submodel, the whole for ``None``, which inside computes what kernels will of the files.

        Raises ``UserError`` listing the names there are.
        """
        spec = None if name is None else self.source.manifest.submodel(name)
        with self.source.served([self.model]):
            if spec is None or self.submodels is None:
                yield self.model
                return
            mix = SubmodelMix.one_hot(self.submodels.space, spec, next(self.model.parameters()).device)
            with self.submodels.running(mix) as submodel:
                yield submodel
            self.submodels.release()


def build_served(source: Source) -> Served:
    """Build and fill the model of a source. Raises ``UserError`` where the files are damaged."""
    runtime.start()
    # Transformer Engine's linears round nothing before their fused norms
    leaves = runtime.hybrid_stack_spec("auto" if source.inputs is None else "local")
    shape, space = source.manifest.shape, space_of(source.manifest)
    model = build_model(shape, spec=leaves) if space is None else build_elastic_model(space, spec=leaves)
    source.fill([model])
    model.eval()
    return Served(source, model, None if space is None else SlicedModel(model, leaves, alike=round_alike))
