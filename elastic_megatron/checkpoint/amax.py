"""Largest magnitudes that calibration found: ``amax.safetensors`` of a quantised Megatron checkpoint.

They are numbers of the whole model, a pair a weight, so that any parallel layout reads what any other wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError
from .manifest import Manifest
from .stored import quantised_weights

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
        pairs = load_file(folder / FILE)
        if odd := [name for name, pair in pairs.items() if pair.shape != (2,) or pair.dtype != torch.float32]:
            raise TypeError(f"{odd[0]!r} is no pair of fp32 numbers")
        return {name: Amax(*pair.unbind()) for name, pair in pairs.items()}
    except (OSError, SafetensorError, TypeError) as e:
        raise UserError(
            f"{folder / FILE} cannot be read ({e}), and elastic.json says that the model is quantised; {_REMEDY}"
        ) from None


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
