"""The parallel layouts under which training, ranking and checkpoints are compared with one process.

This list is also the source of the table of docs/parallelism.md: ``tools/parallel_table.py`` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

# what a test may prove of a layout: the same curve, the same ranking, the same curve after resuming elsewhere, and
# sorted shards that are the shards of the sorted model
PROPERTIES = ("training", "ranking", "resume", "sort")


@dataclass(frozen=True)
class Layout:
    """One way to place a model on ranks.

    Args:
        world: ranks.
        parallel: a recipe's ``parallel`` section; keys left out keep the recipe's defaults.
        note: what this layout shows that others do not.
    """

    name: str
    world: int
    parallel: Mapping[str, Any] = field(hash=False)
    note: str

    def size(self, key: str) -> int:
        """Ranks of a group, or pipeline chunks of a rank."""
        return self.parallel.get(key) or 1

    @property
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return self.world // prod(self.size(key) for key in ("tensor", "context", "pipeline"))

    @property
    def moe(self) -> bool:
        """Whether the model may have MoE layers: Megatron wants sequence parallelism beside them."""
        return self.size("tensor") == 1 or bool(self.parallel.get("sequence"))


LAYOUTS = (
    Layout("TP2+SP", 2, {"tensor": 2, "sequence": True}, "experts cut over the tensor ranks, by default"),
    Layout("TP2", 2, {"tensor": 2}, "every tensor rank has the whole residual stream; no MoE layers"),
    Layout("EP2", 2, {"expert": 2, "dispatcher": "alltoall"}, "whole experts on each rank"),
    Layout("EP2-allgather", 2, {"expert": 2, "dispatcher": "allgather"}, "the other dispatcher"),
    Layout(
        "TP2+SP+ETP1+EP2",
        2,
        {"tensor": 2, "sequence": True, "expert_tensor": 1, "expert": 2},
        "the ranks that share other layers have whole experts",
    ),
    Layout(
        "TP2+SP+ETP2",
        2,
        {"tensor": 2, "sequence": True, "expert_tensor": 2, "dispatcher": "allgather"},
        "expert tensor parallelism asked for; with the other dispatcher",
    ),
    Layout("PP2", 2, {"pipeline": 2, "recompute": "full"}, "several budgets in flight, recomputed"),
    Layout("PP2+VPP2", 2, {"pipeline": 2, "virtual_pipeline": 2}, "both neighbours are the same rank"),
    Layout("CP2", 2, {"context": 2}, "Mamba heads and SSM groups change places with the sequence"),
    Layout("DP2", 2, {"distributed_optimizer": True}, "each rank has a part of the optimizer"),
    Layout("DP2-plain", 2, {"distributed_optimizer": False}, "each rank has the whole optimizer"),
    Layout("DP2+overlap", 2, {"overlap": True}, "reduces while parameters are untouched by a micro-batch"),
    Layout(
        "TP2+SP+ETP1+EP2+PP2",
        4,
        {
            "tensor": 2,
            "sequence": True,
            "expert_tensor": 1,
            "expert": 2,
            "pipeline": 2,
            "recompute": "full",
        },
        "all that a large MoE needs at once",
    ),
    Layout("TP2+SP+CP2", 4, {"tensor": 2, "sequence": True, "context": 2}, "the sequence is cut twice"),
    Layout("EP4", 4, {"expert": 4}, "data-parallel ranks that must share a draw"),
    Layout("PP2+DP2", 4, {"pipeline": 2}, "replicas of a pipeline"),
    Layout(
        "TP2+SP+DP2+overlap",
        4,
        {"tensor": 2, "sequence": True, "overlap": True},
        "replicas of a tensor-parallel model",
    ),
)


@dataclass(frozen=True)
class Axis:
    """A row of the table.

    Args:
        key: in a recipe's ``parallel`` section; ``None`` for what the other sizes leave over.
        rule: what the axis asks of model and batch; ``elastic_megatron/cost/layout.py`` checks it.
    """

    name: str
    key: str | None
    rule: str

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """The layouts that test this axis: those that set its key."""
        return tuple(
            layout
            for layout in LAYOUTS
            if (layout.replicas > 1 if self.key is None else self.key in layout.parallel)
        )


AXES = (
    Axis(
        "tensor",
        "tensor",
        "divides the SSM groups, the vocabulary and, in every size, heads and feed-forward widths and their lanes; "
        "is a divisor or a multiple of the KV heads",
    ),
    Axis("sequence", "sequence", "needs `tensor` above 1, MoE layers need it; `tensor` divides `seq_length`"),
    Axis("expert", "expert", "needs MoE layers; divides the experts of every size and their lanes"),
    Axis(
        "expert tensor",
        "expert_tensor",
        "is `tensor` unless set; divides the expert width in every size and its lanes",
    ),
    Axis("dispatcher", "dispatcher", "either; ranks that exchange tokens share a draw (`samples_per_draw`)"),
    Axis("pipeline", "pipeline", "at most a stage for each layer; stages may be uneven"),
    Axis(
        "virtual pipeline",
        "virtual_pipeline",
        "needs `pipeline` above 1, which divides the micro-batches of a step; at most a chunk for each layer",
    ),
    Axis(
        "context",
        "context",
        "`seq_length` is a multiple of 2 x `context`; `tensor` x `context` divides the Mamba heads of every size; "
        "is a divisor or a multiple of the SSM groups on a tensor rank",
    ),
    Axis(
        "data",
        None,
        "world / (`tensor` x `pipeline` x `context`); `global_batch_size` is a multiple of it x `micro_batch_size`",
    ),
    Axis("distributed optimizer", "distributed_optimizer", "on unless set to false"),
    Axis("overlap", "overlap", "communication of gradients and parameters while others are computed"),
    Axis("recomputation", "recompute", "`full` runs each layer again, at the widths of its micro-batch"),
)
