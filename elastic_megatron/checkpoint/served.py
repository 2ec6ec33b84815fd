"""Built models that compute what will be served of a quantised checkpoint: its numbers, and rounded inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..quantization.formats import INPUT_SCALE, Format
from ..quantization.inputs import rounding
from ..quantization.packing import fake_quantise, scale_of
from ..space import ParentShape
from .amax import Amax
from .manifest import Manifest
from .shards import Shard, by_name, shards
from .stored import StoredModel
from .torch_dist import open_torch_dist


@dataclass(frozen=True)
class Inputs:
    """What the inputs of quantised linears are rounded with.

    Args:
        form: of the weights, and of the inputs.
        scales: fp32 scalars, by name of the whole weight in the whole model.
    """

    form: Format
    scales: Mapping[str, Tensor]

    @contextmanager
    def rounded(self, chunks: Sequence[nn.Module], shape: ParentShape) -> Iterator[None]:
        """Inside, this rank's bare chunks of a model of that shape round them."""
        linears = [
            (chunk.get_submodule(shard.module), self.scales[shard.name])
            for chunk in chunks
            for shard in shards(chunk, shape)
            if shard.name in self.scales
        ]
        with rounding(self.form, linears):
            yield


def inputs_of_training(form: Format, amax: Mapping[str, Amax]) -> Inputs:
    """Of a checkpoint with these magnitudes."""
    return Inputs(form, {name: scale_of(form, found.input) for name, found in amax.items()})


def inputs_of(stored: StoredModel) -> Inputs | None:
    """Of a directory as it lies; ``None`` where it is not quantised."""
    if stored.quantised is None:
        return None
    # q, k and v have one input, whose scales are the same number
    scales = {
        replace(tensor, part=None).name: stored.rows(tensor).max()
        for tensor in stored.tensors.values()
        if tensor.part is not None and tensor.part.suffix == INPUT_SCALE
    }
    return Inputs(stored.quantised.format, scales)


@torch.no_grad()
def round_weights(
    chunks: Sequence[nn.Module], folder: Path, manifest: Manifest, amax: Mapping[str, Amax]
) -> None:
    """Round the weights of built chunks that hold those of a checkpoint, in the dtype that it keeps them in.

    That is what training multiplied with, and what is read back from an export.

    Raises ``UserError`` where ranks share the columns of a block.
    """
    assert manifest.quantised is not None
    form, stored = manifest.quantised.format, open_torch_dist(folder, manifest, None)
    for name, parts in by_name(chunks, manifest.shape).items():
        for shard in parts if name in amax else ():
            check_blocks(form, shard)
            weight = shard.tensor.to(stored.dtype(stored.tensors[name]))
            shard.tensor.copy_(fake_quantise(form, weight, amax[name].weight.to(weight.device)))


def check_blocks(form: Format, shard: Shard) -> None:
    """Raise ``UserError`` where ranks share columns that share a scale."""
    columns = shard.tensor.shape[1]
    if columns % form.block:
        raise UserError(
            f"{shard.name} has {columns} columns on each of {shard.group.size()} tensor-parallel ranks, and "
            f"{form.algo} columns share a scale in blocks of {form.block}; use fewer ranks (parallel.tensor, "
            "parallel.expert_tensor)"
        )
