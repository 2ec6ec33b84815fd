"""Checkpoints of quantised models, as training leaves them: weights in high precision, and magnitudes beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

import torch
from parity import randomise
from quantised_dirs import family
from torch import Tensor, nn

from elastic_megatron import runtime
from elastic_megatron.blocks import build_elastic_model
from elastic_megatron.checkpoint.amax import Amax
from elastic_megatron.checkpoint.distributed import save
from elastic_megatron.checkpoint.hf_names import hf_pieces
from elastic_megatron.checkpoint.manifest import FILE, Manifest
from elastic_megatron.checkpoint.quantised_plan import planned
from elastic_megatron.checkpoint.stored import StoredModel, model_tensors, quantised_weights
from elastic_megatron.checkpoint.torch_dist import open_torch_dist
from elastic_megatron.ops.locate import weights
from elastic_megatron.quantization.formats import Format
from elastic_megatron.quantization.presets import PRESETS
from elastic_megatron.space import ParentShape


@dataclass(frozen=True)
class Trained:
    """A checkpoint, and what it was saved from."""

    folder: Path
    manifest: Manifest
    state: Mapping[str, Tensor]
    amax: Mapping[str, Amax]

    def unquantised(self) -> StoredModel:
        """The weights that training updates."""
        return open_torch_dist(self.folder, replace(self.manifest, quantised=None), None)

    def largest(self, key: str, _: Tensor) -> tuple[Tensor, Tensor]:
        """The magnitudes of a weight by its Hugging Face name, as ``quantised_dirs.pack`` asks for them."""
        return self.amax[megatron_names(self.manifest.shape)[key]]


def train(
    directory: Path,
    form: Format,
    *,
    manifest: Manifest | None = None,
    dtype: torch.dtype = torch.bfloat16,
    preset: str = "mamba_moe_aggressive",
    keep_feeding_mamba: bool = True,
    hf_files: Path | None = None,
) -> Trained:
    """Save a model with random weights whose largest lie beyond the magnitudes: training has moved them.

    Args:
        hf_files: the tokenizer.
    """
    runtime.start(seed=1)
    manifest = manifest or family()
    assert manifest.space is not None
    model = build_elastic_model(manifest.space, dtype=dtype)
    randomise(model)
    blocks = PRESETS[preset].blocks
    quantised = planned(form, manifest.shape, blocks, keep_feeding_mamba=keep_feeding_mamba, version="0.47.0")
    manifest = replace(manifest, quantised=quantised)
    state = whole_state(model)
    found = magnitudes(manifest, state)
    folder = save(directory, 3, [model], manifest, hf_files=hf_files, amax=found)
    return Trained(folder, Manifest.read(folder / FILE), state, found)


def magnitudes(manifest: Manifest, state: Mapping[str, Tensor]) -> dict[str, Amax]:
    """Of nine tenths of the largest weight; experts share that of their inputs, and those of different linears differ."""
    assert manifest.quantised is not None
    return {
        name: Amax(
            0.9 * state[name].abs().max().float(),
            torch.tensor(1 + crc32(f"{tensor.layer} {tensor.layout.name}".encode()) % 97 / 7),
        )
        for name, tensor in quantised_weights(manifest.shape, manifest.quantised).items()
    }


def megatron_names(shape: ParentShape) -> dict[str, str]:
    """By Hugging Face name."""
    return {piece.key: tensor.name for tensor in model_tensors(shape) for piece in hf_pieces(tensor)}


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a built model, copied."""
    return {name: tensor.clone() for name, tensor in weights(model.state_dict()).items()}
