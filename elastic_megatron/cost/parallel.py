"""What cost formulas need to know of a parallel layout and a batch; a recipe's sections satisfy both."""

from __future__ import annotations

from math import lcm, prod
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
    @property
    def draw_size(self) -> int: ...


def size_of(parallel: Layout, group: str) -> int:
    """Ranks of a group; experts are split over ``tensor`` ranks unless ``expert_tensor`` says otherwise."""
    if group == "expert_tensor":
        return parallel.expert_tensor or parallel.tensor
    return getattr(parallel, group)


def smallest_world(parallel: Layout) -> int:
    """Ranks of the smallest job that this layout fits: whole model replicas and whole expert groups."""
    replica = parallel.tensor * parallel.context
    return parallel.pipeline * lcm(replica, size_of(parallel, "expert_tensor") * parallel.expert)


def rank_grids(parallel: Layout) -> tuple[dict[str, int | None], dict[str, int | None]]:
    """How dense and expert parameters lie on the ranks: group -> size, innermost ranks first.

    The product of each grid is the world; ``data`` is None where the world is unknown, or no multiple of
    the others.
    """
    grids = []
    for groups in (("tensor", "context", "pipeline"), ("expert_tensor", "expert", "pipeline")):
        sizes: dict[str, int | None] = {group: size_of(parallel, group) for group in groups}
        world = parallel.world_size
        ranks = prod(size_of(parallel, group) for group in groups)
        sizes["data"] = None if world is None or world % ranks else world // ranks
        grids.append(sizes)
    return grids[0], grids[1]
