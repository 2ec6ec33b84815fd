"""Numbers that are not finite, and scales that are not positive, are found while they are copied, and named."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.hf_names import hf_pieces
from ..checkpoint.stored import ModelTensor
from ..errors import UserError
from ..quantization.formats import WEIGHT
from .copy import Sink

# names in a message; a diverged model has thousands
_NAMED = 8
_FLOAT8 = torch.float8_e4m3fn


@dataclass
class Nonfinite:
    """What was found in a target: how many values of each tensor, by its Hugging Face name. For several threads."""

    where: Path
    found: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def see(self, tensor: ModelTensor, start: int, rows: Tensor) -> None:
        """Look at rows of a tensor of the target, from ``start``."""
        scale = tensor.part is not None and tensor.part.suffix != WEIGHT
        if not scale and all_finite(rows):
            return
        bad, row = _wrong_scales(rows) if scale else ~is_finite(rows), 0
        for piece in hf_pieces(tensor):
            first, last = max(start, row), min(start + len(rows), row + piece.rows)
            if first < last and (n := int(bad[first - start : last - start].sum())):
                with self._lock:
                    self.found[piece.key] = self.found.get(piece.key, 0) + n
            row += piece.rows

    def refuse(self, *, unless: bool) -> str | None:
        """A warning of what was found; ``None`` where all is well.

        Raises ``UserError`` instead, unless it is wanted so.
        """
        if not self.found:
            return None
        named = [
            f"{key} ({n} value{'s' * (n > 1)})"
            for key, n in sorted(self.found.items(), key=_natural)[:_NAMED]
        ]
        more = f" and {len(self.found) - _NAMED} more" if len(self.found) > _NAMED else ""
        what = (
            f"{self.where}: {len(self.found)} tensor{'s' * (len(self.found) > 1)} with numbers that are not finite, or "
            f"scales that are not positive: {', '.join(named)}{more}"
        )
        if unless:
            return f"warning: {what}"
        raise UserError(
            f"{what}; nothing was written: use a checkpoint from before they appeared, or insist with "
            "--allow-nonfinite (in a recipe, export.allow_nonfinite)"
        )


def _natural(item: tuple[str, int]) -> list[tuple[int, str]]:
    """Layers and experts by their number."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in item[0].split(".")]


@dataclass(frozen=True)
class Watched:
    """A sink whose rows are looked at on their way."""

    sink: Sink
    seen: Nonfinite

    def write(self, tensor: ModelTensor, start: int, rows: Tensor) -> None:
        """As ``Sink.write``."""
        self.seen.see(tensor, start, rows)
        self.sink.write(tensor, start, rows)


def all_finite(values: Tensor) -> bool:
    """One pass: a sum is not finite where a term is not, and is looked at more closely where it overflows."""
    if not values.dtype.is_floating_point:
        return True
    if values.dtype is not _FLOAT8:
        # of BF16 torch adds in fp32 too, and faster; FP16 would overflow
        total = values.sum(dtype=torch.float32 if values.dtype is torch.float16 else None)
        if total.isfinite():
            return True
    return bool(is_finite(values).all())


def is_finite(values: Tensor) -> Tensor:
    """Of each value; e4m3 has no infinities and one NaN of either sign."""
    if values.dtype is _FLOAT8:
        return (values.view(torch.uint8) & 0x7F) != 0x7F
    return values.isfinite() if values.dtype.is_floating_point else torch.ones_like(values, dtype=torch.bool)


def _wrong_scales(values: Tensor) -> Tensor:
    """A block of zeros may have the scale 0, as older releases of ModelOpt wrote it; a whole tensor may not."""
    numbers = values.float()
    positive = numbers >= 0 if values.dtype is _FLOAT8 else numbers > 0
    return ~(positive & numbers.isfinite())
