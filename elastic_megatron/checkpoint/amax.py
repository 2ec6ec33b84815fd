"""Largest magnitudes that calibration found: ``amax.safetensors`` of a quantised Megatron checkpoint.

They are numbers of the whole model, a pair a weight, so that any parallel layout reads what any other wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..files.reading import inside
from .manifest import Manifest
from .safetensors_files import SafetensorsFiles
from .stored import Entry, quantised_weights

FILE = "amax.safetensors"
_REMEDY = "restore both from a backup, or name an older iteration in the tracker file"


class Amax(NamedTuple):
    """fp32 scalars of one linear, on the CPU: of its weight, and of what it is multiplied with."""

    weight: Tensor
    input: Tensor


def write_amax(folder: Path, found: Mapping[str, Amax]) -> None:
    """``found`` goes by the name of the whole weight in the whole model (``ModelTensor.name``)."""
    save_file({name: torch.stack(pair).float() for name, pair in sorted(found.items())}, folder / FILE)


def read_amax(folder: Path) -> dict[str, Amax]:
    """Inverse of ``write_amax``. Raises ``UserError`` where the file is missing or damaged."""
    try:
        files = SafetensorsFiles([inside(folder, FILE, folder)])
    except UserError as e:
        raise UserError(f"elastic.json says that the model is quantised, but {e}; {_REMEDY}") from None
    found = {}
    for name, entry in files.entries.items():
        if entry != Entry((2,), torch.float32):
            raise UserError(f"{folder / FILE}: {name!r} is no pair of fp32 numbers; {_REMEDY}")
        files.read(name, 0, pair := torch.empty(2))
        if not (pair.isfinite() & (pair >= 0)).all():
            raise UserError(f"{folder / FILE}: {pair.tolist()} of {name!r} are no magnitudes; {_REMEDY}")
        found[name] = Amax(*pair.unbind())
    return found


def amax_of(folder: Path, manifest: Manifest) -> dict[str, Amax]:
    """Those of the weights that ``manifest.quantised`` names. Raises ``UserError`` also where one has none."""
    assert manifest.quantised is not None
    found, weights = read_amax(folder), quantised_weights(manifest.shape, manifest.quantised)
    if odd := sorted(found.keys() ^ weights.keys()):
        raise UserError(
            f"{folder / FILE} and elastic.json name different weights ({odd[0]!r} is in one, {len(odd)} in all); "
            f"{_REMEDY}"
        )
    return found
