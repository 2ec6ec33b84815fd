"""Compare what was written with what it was made from, row by row, through the readers of the written format."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checkpoint.stored import ModelTensor, StoredModel
from ..errors import UserError


class Comparison:
    """A sink that writes nothing: rows that should have been written are compared with those that were."""

    def __init__(self, written: StoredModel) -> None:
        self._written = written

    def write(self, tensor: ModelTensor, start: int, rows: Tensor) -> None:
        """As ``Sink.write``. Raises ``UserError`` naming the first tensor that differs in a bit."""
        found = self._written.rows(tensor, start, start + len(rows))
        if found.dtype != rows.dtype or not torch.equal(_bits(found), _bits(rows)):
            raise UserError(
                f"{self._written.path}: tensor {tensor.name!r} differs from its source in rows {start} to "
                f"{start + len(rows) - 1} when read back; the disk or its cache is faulty: convert again"
            )


def _bits(tensor: Tensor) -> Tensor:
    """Bytes: a NaN equals itself."""
    return tensor.reshape(-1).view(torch.uint8)
