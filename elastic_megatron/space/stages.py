"""How ranks share a model: its layers among pipeline parts, its experts among replicas."""

from __future__ import annotations

from itertools import accumulate, pairwise
from math import lcm


def stage_layers(num_layers: int, parts: int) -> tuple[range, ...]:
    """Layer numbers (from 0) of each of ``parts`` consecutive parts, in the order of the pipeline.

    Sizes differ by at most one. The shorter parts are the last, then the first, and so on inwards: the output
    head and the embedding live at the ends, and the first stage keeps the most micro-batches in flight. With
    a virtual pipeline ``parts`` is stages x chunks, and chunk ``c`` of stage ``s`` is part ``c * stages + s``.

    Raises:
        ValueError: if there are more parts than layers, or no parts at all.
    """
    if not 1 <= parts <= num_layers:
        raise ValueError(f"{num_layers} layers cannot be cut into {parts} parts of at least one layer")
    size, longer = divmod(num_layers, parts)
    from_the_ends = sorted(range(parts), key=lambda part: (min(part, parts - 1 - part), -part))
    long = set(from_the_ends[parts - longer :])
    cuts = [0, *accumulate(size + (part in long) for part in range(parts))]
    return tuple(range(first, end) for first, end in pairwise(cuts))


def replicas_per_draw(tensor: int, context: int, expert_tensor: int | None, expert: int) -> int:
    """Data-parallel ranks whose tokens meet in the same experts, so that they must share a draw of widths.

    A model replica is tensor x context consecutive ranks of a pipeline stage, an expert group expert_tensor (tensor
    unless given) x expert of them (Megatron's rank order). Whatever overlaps belongs together, which makes blocks of
    the least common multiple.
    """
    replica = tensor * context
    return lcm(replica, (expert_tensor or tensor) * expert) // replica
