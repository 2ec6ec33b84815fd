"""Are the tensors that are stored of quantised weights the ones that the format wants?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..errors import UserError
from ..quantization.formats import WEIGHT
from .hf_keys import module_of
from .hf_names import hf_pieces
from .hf_quantised import FILE, Quantised
from .stored import Entry, ModelTensor


def check_parts(
    directory: Path, quantised: Quantised, tensors: Sequence[ModelTensor], found: Mapping[str, Entry]
) -> None:
    """Raise ``UserError`` that names the first stored tensor of another dtype, width or number than the format says.

    Missing tensors and shapes are those of any model, and not looked at here.

    Args:
        tensors: of the model, as stored.
        found: what the headers say.
    """
    form = quantised.format
    scales = {part.suffix for part in form.parts} - {WEIGHT}
    for name in found:
        if name.rpartition(".")[2] in scales and quantised.excludes(name):
            raise UserError(
                f"{directory}: tensor {name!r} belongs to a weight that {FILE} excludes from {form.algo}; restore the "
                "file that was changed"
            )
    for tensor in tensors:
        part = tensor.part
        if part is None:
            continue
        for key in dict.fromkeys(piece.key for piece in hf_pieces(tensor)):
            if key in found and found[key].dtype is not getattr(torch, part.dtype):
                raise UserError(
                    f"{directory}: tensor {key!r} has dtype {str(found[key].dtype).removeprefix('torch.')}, and the "
                    f"{part.suffix} of {form.algo} is {part.dtype}; where {module_of(key)!r} is not quantised, "
                    f"exclude it in {FILE} and config.json"
                )
            if (columns := tensor.layout.shape(tensor.sizes)[1]) % form.block:
                raise UserError(
                    f"{directory}: {key!r} stands for {columns} columns, and {form.algo} has blocks of {form.block}; "
                    "leave this linear unquantised"
                )
