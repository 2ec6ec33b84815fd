"""Megatron's model builder and checkpoints around a distilled student."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron.training.models import HybridModelBuilder

from ... import runtime
from ...checkpoint.agreement import ROUTER
from ...training.distill import DistilledChunk


class FullPrecisionBuilder(HybridModelBuilder):
    """Megatron's builder without its 16-bit wrapper.

    ``params_dtype`` decides the type of parameters where they are made; the wrapper would also round those that
    are fp32 on purpose: ``A_log``, ``D`` and the budget router.
    """

    def build_distributed_models(self, *args: Any, **kwargs: Any) -> list[Any]:
        return super().build_distributed_models(*args, **(kwargs | {"mixed_precision_wrapper": None}))


class CheckpointedChunk(DistilledChunk):
    """A ``DistilledChunk`` that Megatron's checkpoints see as the student alone, under the student's names."""

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[Any, ...] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        shards = self.module.sharded_state_dict(prefix, sharded_offsets, metadata)
        stage = runtime.groups().pp.rank()
        for key, shard in shards.items():
            if key.startswith(prefix + ROUTER):  # lies on every pipeline stage; the first one's is saved
                shard.replica_id = (stage, *shard.replica_id[1:])
        return shards

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        return self.module.load_state_dict(state_dict, strict=strict, assign=assign)
