"""Hugging Face directories of states in memory, and their names by the slow way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic_megatron.checkpoint.hf_names import HEAD, hf_pieces
from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.stored import ModelTensor, in_memory, model_tensors
from elastic_megatron.conversion import Report, Request, to_hf
from elastic_megatron.cost.sizes import parent_fields
from elastic_megatron.ops.locate import locate
from elastic_megatron.space import ParentShape


def write_hf(
    directory: Path,
    manifest: Manifest,
    state: Iterable[tuple[str, Tensor]],
    *,
    side_files: Path | None = None,
    submodel: str | None = None,
    elastic: bool = False,
    plain_order: bool = False,
    **options: Any,
) -> Report:
    """``to_hf`` of a state under Megatron's names."""
    source = replace(in_memory(manifest, dict(state)), side_files=side_files)
    return to_hf(source, [Request(directory, submodel, elastic, plain_order)], **options)


def slice_hf(source: Path, destination: Path, submodel: str | Sequence[str], elastic: bool = False) -> Report:
    """``to_hf`` of one submodel, or of several below ``destination``."""
    wanted = {submodel: destination} if isinstance(submodel, str) else {n: destination / n for n in submodel}
    return to_hf(read_hf(source), [Request(folder, name, elastic) for name, folder in wanted.items()])


def hub_tensors(parent: ParentShape, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The Hugging Face tensors of one Megatron tensor, by taking it apart."""
    layer, layout, expert = locate(parent, name)
    tensor_of = ModelTensor(layout, parent_fields(parent), layer, expert)
    names = list(dict.fromkeys(piece.key for piece in hf_pieces(tensor_of)))
    tensors = [tensor]
    if not layout.hf:
        groups, sizes = parent.num_query_groups, parent_fields(parent)
        shares = [s.size(sizes) // groups for s in layout.dims[0]]
        pieces = tensor.unflatten(0, (groups, -1)).split(shares, dim=1)
        tensors = [piece.flatten(0, 1) for piece in pieces]
    out = list(zip(names, tensors, strict=True))
    return [*out, (HEAD, tensor)] if parent.tie_embeddings and layout.role == "lookup" else out


def megatron_tensors(parent: ParentShape, read: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every Megatron tensor, by putting the Hugging Face tensors together."""
    for tensor in model_tensors(parent):
        pieces = [read(key) for key in dict.fromkeys(p.key for p in hf_pieces(tensor))]
        if not tensor.layout.hf:
            parts = [piece.unflatten(0, (parent.num_query_groups, -1)) for piece in pieces]
            pieces = [torch.cat(parts, dim=1).flatten(0, 1)]
        yield tensor.name, pieces[0]
