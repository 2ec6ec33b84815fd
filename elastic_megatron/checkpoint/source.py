"""Open a model wherever it lies: a Megatron checkpoint, a Hugging Face directory, or sizes to initialise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..errors import UserError
from . import distributed, shards, tracker
from .manifest import FILE, Manifest


@dataclass(frozen=True)
class Source:
    """A model to be read: its description, and how to fill a built one of ``manifest.shape``.

    ``fill`` takes this rank's pipeline chunks, bare, under any layout, and is collective.
    """

    path: Path
    manifest: Manifest
    fill: Callable[[Sequence[nn.Module]], object]
    hf_files: Path | None


def open_source(path: Path) -> Source:
    """A run folder, checkpoint, ``iter_*`` folder or Hugging Face directory.

    Raises ``UserError`` where it is none of them, or damaged.
    """
    if tracker.is_checkpoint(path):
        folder = tracker.resolve(path)
        side = folder / "hf"
        return Source(
            folder,
            Manifest.read(folder / FILE),
            lambda chunks: distributed.load(folder, chunks),
            side if side.is_dir() else None,
        )
    if path.is_dir() and (path / "config.json").exists():
        from .hf import read_hf

        directory = read_hf(path)

        def fill(chunks: Sequence[nn.Module]) -> None:
            parts = shards.by_name(chunks, directory.manifest.shape)
            shards.fill(parts, directory.tensors(parts))

        return Source(path, directory.manifest, fill, path)
    what = (
        "does not exist"
        if not path.exists()
        else "is neither a Megatron checkpoint nor a Hugging Face directory"
    )
    raise UserError(f"{path} {what}; give a run folder, an iter_* folder or a directory with config.json")
