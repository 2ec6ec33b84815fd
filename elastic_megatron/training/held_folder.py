"""One job at a time writes to a run folder: rank 0 holds its lock, for all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from ..checkpoint.agreement import same_on_all_ranks
from ..checkpoint.run_folder import RECIPE
from ..files import lock
from ..files.writing import remove_abandoned, write_text
from ..recipe import Recipe, dump


class HeldFolder:
    """A run folder that this job alone writes to.

    Args:
        held: its lock, on rank 0; ``None`` on the others.
    """

    def __init__(self, path: Path, held: lock.Held | None) -> None:
        self.path, self._held = path, held

    @property
    def lost(self) -> bool:
        """Was the lock missed, on rank 0, at its last sign of life?"""
        return self._held is not None and self._held.lost

    def check(self) -> None:
        """Raises ``UserError`` on rank 0 where the folder was removed, or another job has taken it over."""
        if self._held is not None:
            self._held.check()

    def describe(self, recipe: Recipe) -> None:
        """Leave the resolved recipe in the folder; collective."""
        with same_on_all_ranks(f"{self.path} cannot be written"):
            if self._held is not None:
                write_text(self.path / RECIPE, dump(recipe))


@contextmanager
def held_folder(path: Path, command: str) -> Iterator[HeldFolder]:
    """Hold a run folder, on ranks that have been joined; collective.

    Raises ``UserError`` on all ranks, which names the job that writes to the folder already.
    """
    held = None
    with same_on_all_ranks(f"{path} cannot be written"):
        if torch.distributed.get_rank() == 0:
            held = lock.acquire(lock.within(path), command)
            remove_abandoned(path)
    with held or nullcontext():
        yield HeldFolder(path, held)
