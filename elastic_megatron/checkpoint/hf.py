"""Hugging Face directories: read, write and slice them without building a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import UserError
from .hf_names import from_hf, hf_tensors, to_hf
from .hf_read import HFDirectory, read_config, read_hf, side_files
from .hf_write import write_hf

__all__ = [
    "HFDirectory",
    "from_hf",
    "hf_tensors",
    "read_config",
    "read_hf",
    "side_files",
    "slice_hf",
    "to_hf",
    "write_hf",
]


def slice_hf(
    source: Path,
    destination: Path,
    submodel: str | Sequence[str],
    *,
    elastic: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    plain_order: bool = False,
) -> list[Path]:
    """Cut submodels out of an elastic directory, streaming; returns the directories written.

    Args:
        submodel: a name, written to ``destination`` itself, or several, each written to ``destination/NAME``.
        elastic, dtype, max_shard_bytes, plain_order: as in ``write_hf``; by default each tensor's own dtype.

    Raises ``UserError`` as ``read_hf`` and ``write_hf`` do, and where ``source`` is not elastic.
    """
    opened = read_hf(source)
    if opened.manifest.space is None:
        raise UserError(f"{source} has no elastic_config.json and so no submodels; export it with --elastic")
    wanted = {submodel: destination} if isinstance(submodel, str) else {n: destination / n for n in submodel}
    for name in wanted:
        opened.manifest.submodel(name)
    for name, target in wanted.items():
        write_hf(
            target,
            opened.manifest,
            opened.tensors(),
            submodel=name,
            elastic=elastic,
            tokenizer_dir=source if opened.tokenizer_files else None,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            plain_order=plain_order,
        )
    return list(wanted.values())
