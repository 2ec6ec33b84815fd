"""What a conversion did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """Args:
    written: the directories or checkpoints, in the order they were asked for.
    tensors: in them all, as the files name them.
    bytes_read, bytes_written: weights only, without what ``verified`` read again.
    verified: whether everything was read back and compared with the source.
    notes: a line for each thing that is not as it was in the source, and was not asked for.
    """

    written: Sequence[Path]
    tensors: int
    bytes_read: int
    bytes_written: int
    verified: bool
    notes: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**vars(self), "written": [str(p) for p in self.written], "notes": list(self.notes)}
