"""Write a Megatron checkpoint from a stored model, tensor by tensor."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import integrity, tracker
from ..checkpoint.dequantised import dequantised
from ..checkpoint.libraries import LibraryTorchDist
from ..checkpoint.manifest import FILE, Manifest
from ..checkpoint.side_files import copy_side_files
from ..checkpoint.stored import Entry, ModelTensor, StoredModel, stored_shapes
from ..checkpoint.torch_dist_names import dist_pieces
from ..errors import UserError
from ..files.lock import locked, within
from .copy import Progress
from .cut import Model, cut_model, widened
from .disk import check_space, flush, write_errors
from .finite import Nonfinite
from .report import Report
from .torch_dist_files import write_torch_dist
from .verify import check_entries, compare, refuted


def to_megatron(
    source: StoredModel,
    directory: Path,
    *,
    verify: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write iteration 0 of a checkpoint, for any parallel layout, in memory that does not grow with the model.

    The tensors keep their dtypes, but those that a checkpoint keeps in one get one that holds them all; of a quantised
    source, they are the numbers that its weights stand for. The checkpoint is written under a hidden name, and the
    tracker names it when it is complete.

    Args:
        directory: the checkpoint root; must hold no checkpoint yet.
        verify: read everything back and compare it with the source before the tracker names it.
        allow_nonfinite: write numbers that are not finite, with a warning in the report.
        progress: called with the number of bytes read, from several threads.

    Raises ``UserError`` where there is a checkpoint already, another command writes to the folder, the disk is too
    small or cannot be written, and for numbers that are not finite.
    """
    _check_vacant(directory)
    source = dequantised(source)
    model = _one_dtype_per_key(cut_model(source))
    dtypes, seen = {cut.target.name: cut.dtype for cut in model.cuts}, Nonfinite(directory)

    def rows(tensor: ModelTensor, start: int, stop: int) -> Tensor:
        found = source.rows(tensor, start, stop).to(dtypes[tensor.name])
        seen.see(tensor, start, found)
        return found

    size = sum(prod(cut.target.shape) * cut.dtype.itemsize for cut in model.cuts)
    check_space({directory: size})
    temporary = tracker.temporary(directory, 0)
    with write_errors(directory), ExitStack() as stack:
        lock = stack.enter_context(locked(within(directory), "import"))
        _check_vacant(directory)  # again: it may have been written since
        tracker.begin(directory, 0)
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)

        tensors = [(cut.target, cut.dtype) for cut in model.cuts]
        write_torch_dist(temporary, tensors, rows, progress=progress)
        warning = seen.refuse(unless=allow_nonfinite)
        source.manifest.write(temporary / FILE)
        if source.side_files is not None:
            copy_side_files(source.side_files, source.manifest.hf_config, temporary / "hf")
        if verify:
            _verify(temporary, model, source, progress)
        flush(temporary / FILE)
        integrity.seal(temporary)
        lock.check()
        tracker.publish(directory, 0)
    return Report(
        written=[directory],
        tensors=len(model.cuts),
        bytes_read=size,
        bytes_written=size,
        verified=verify,
        notes=[*source.notes, *widened(source, [model]), *filter(None, [warning])],
    )


def _verify(folder: Path, model: Model, source: StoredModel, progress: Progress | None) -> None:
    """Raise ``UserError`` unless torch finds in the folder what was planned, and nothing else."""
    files, wanted = LibraryTorchDist(folder), dict[str, Entry]()
    flat = stored_shapes(model.tensors, dist_pieces)
    for cut in model.cuts:
        experts = () if cut.target.expert is None else (cut.target.sizes["num_moe_experts"],)
        for piece in dist_pieces(cut.target):
            rows, *inner = flat[piece.key]
            wanted[piece.key] = Entry((*experts, rows // prod(experts), *inner), cut.dtype)
    check_entries(folder, files.entries, wanted)
    if Manifest.read(folder / FILE).to_dict() != source.manifest.to_dict():
        raise refuted(folder / FILE, "describes another model")
    compare(source, model, StoredModel(folder, source.manifest, files, dist_pieces), progress)


def _one_dtype_per_key(model: Model) -> Model:
    """The experts of a layer are stacked in one tensor of the files, which has one dtype."""
    found: dict[str, torch.dtype] = {}
    for cut in model.cuts:
        for piece in dist_pieces(cut.target):
            found[piece.key] = torch.promote_types(found.get(piece.key, cut.dtype), cut.dtype)
    cuts = [replace(cut, dtype=found[dist_pieces(cut.target)[0].key]) for cut in model.cuts]
    return replace(model, cuts=cuts)


def _check_vacant(directory: Path) -> None:
    if tracker.is_checkpoint(directory):
        raise UserError(f"{directory} holds a checkpoint already; choose another folder")
