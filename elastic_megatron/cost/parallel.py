"""What cost formulas need to know of a parallel layout and a batch; a recipe's sections satisfy both."""

from __future__ import annotations

from typing import Protocol


class Layout(Protocol):
    """Sizes of the parallel groups, as in a recipe's ``parallel`` section."""

    @property
    def tensor(self) -> int: ...
    @property
    def sequence(self) -> bool: ...
    @property
    def expert(self) -> int: ...
    @property
    def expert_tensor(self) -> int | None: ...
    @property
    def pipeline(self) -> int: ...
    @property
    def virtual_pipeline(self) -> int | None: ...
    @property
    def context(self) -> int: ...
    @property
    def world_size(self) -> int | None: ...


class Batch(Protocol):
    """What one stage of training feeds, as in a recipe's ``stages``."""

    @property
    def name(self) -> str: ...
    @property
    def seq_length(self) -> int: ...
    @property
    def global_batch_size(self) -> int: ...
    @property
    def micro_batch_size(self) -> int: ...


def size_of(parallel: Layout, group: str) -> int:
    """Ranks of a group; experts are split over ``tensor`` ranks unless ``expert_tensor`` says otherwise."""
    if group == "expert_tensor":
        return parallel.expert_tensor or parallel.tensor
    return getattr(parallel, group)
