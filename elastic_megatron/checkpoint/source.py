"""Open a model wherever it lies: a Megatron checkpoint or a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ..errors import UserError
from . import distributed, integrity, shards, tracker
from .amax import amax_of
from .dequantised import dequantised
from .foreign import foreign_manifest
from .hf_read import read_config, read_hf
from .manifest import FILE, Manifest
from .named import foreign_folder, is_hf, nowhere
from .packed import packed
from .served import Inputs, inputs_of, inputs_of_training, round_weights
from .side_files import side_files
from .stored import StoredModel
from .torch_dist import open_torch_dist


@dataclass(frozen=True)
class Source:
    """A model to be read: its description, and how to fill a built one of ``manifest.shape``.

    ``fill`` takes this rank's pipeline chunks, bare, under any layout, and is collective. Of a quantised model it gives
    the numbers that the weights stand for, and ``manifest`` is that of a model of these numbers; what they are
    multiplied with is rounded inside ``served`` only.

    Args:
        inputs: what inputs are rounded with when it is served; ``None`` where they are not.
    """

    path: Path
    manifest: Manifest
    fill: Callable[[Sequence[nn.Module]], object]
    hf_files: Path | None
    inputs: Inputs | None = None

    def served(self, chunks: Sequence[nn.Module]) -> AbstractContextManager[None]:
        """Inside, filled chunks compute what kernels will of the files: inputs of quantised linears are rounded too.

        The linears must be apart from norms, as in ``runtime.hybrid_stack_spec("local")``.
        """
        return nullcontext() if self.inputs is None else self.inputs.rounded(chunks, self.manifest.shape)


def open_source(path: Path) -> Source:
    """A run folder, checkpoint, ``iter_*`` folder or Hugging Face directory; a quantised one as the numbers it means.

    Raises ``UserError`` where it is none of them, or damaged.
    """
    if tracker.is_checkpoint(path):
        folder = tracker.resolve(path)
        manifest = Manifest.read(folder / FILE)
        if manifest.quantised is not None:
            return _quantised(folder, manifest)
        return Source(folder, manifest, lambda chunks: distributed.load(folder, chunks), _side(folder))
    if is_hf(path):
        directory = read_hf(path)
        stored = dequantised(directory)

        def fill(chunks: Sequence[nn.Module]) -> None:
            parts = shards.by_name(chunks, stored.manifest.shape)
            shards.fill(parts, stored.state(parts))

        return Source(path, stored.manifest, fill, path, inputs_of(directory))
    raise nowhere(path)


def _quantised(folder: Path, manifest: Manifest) -> Source:
    """Weights that training rounds at every step, rounded."""
    assert manifest.quantised is not None
    amax = amax_of(folder, manifest)

    def fill(chunks: Sequence[nn.Module]) -> None:
        distributed.load(folder, chunks)
        round_weights(chunks, folder, manifest, amax)

    inputs = inputs_of_training(manifest.quantised.format, amax)
    return Source(folder, replace(manifest, quantised=None), fill, _side(folder), inputs)


def open_stored(path: Path, config: Path | None = None) -> StoredModel:
    """The same, and checkpoints that Megatron-LM or Megatron-Bridge wrote, to be read tensor by tensor.

    Args:
        config: the Hugging Face directory that a checkpoint of another program came from: its sizes, where the
            checkpoint does not say them, and the tokenizer and config that an export takes along.

    A quantised directory is opened as it lies there: ``dequantised`` of it has the numbers. A checkpoint of a quantised
    model is opened as what will be stored of it.

    Raises ``UserError`` where it is none of them, or a header is damaged; sizes of files are compared with
    ``integrity.json`` where there is one, their bytes are not.
    """
    if config is not None and not is_hf(config):
        raise UserError(f"{config} has no config.json; give a Hugging Face model directory")
    side = config if config is not None and side_files(config, read_config(config)) else None
    if folder := foreign_folder(path):
        return open_torch_dist(folder, foreign_manifest(folder, config), side)
    if tracker.is_checkpoint(path):
        folder = tracker.resolve(path)
        manifest = Manifest.read(folder / FILE)
        integrity.verify_sizes(folder)
        stored = open_torch_dist(folder, manifest, side or _side(folder))
        quantised = manifest.quantised
        return stored if quantised is None else packed(stored, quantised, amax_of(folder, manifest))
    if is_hf(path):
        return read_hf(path)
    raise nowhere(path)


def _side(folder: Path) -> Path | None:
    side = folder / "hf"
    return side if side.is_dir() else None
