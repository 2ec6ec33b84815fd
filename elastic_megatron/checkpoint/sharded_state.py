"""The sharded state dicts by which Megatron saves and loads this rank's chunks."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from torch import nn

from .. import runtime
from .agreement import ROUTER


def named(chunks: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Chunks under the names that Megatron's optimizers look for."""
    return [("model" if len(chunks) == 1 else f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def model_shards(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Sharded state dicts of the chunks. The budget router lies on every pipeline stage; the first one's is saved."""
    stage = runtime.groups().pp.rank()
    shards: dict[str, Any] = {}
    for name, chunk in named(chunks):
        shards[name] = chunk.sharded_state_dict(metadata=sharding())
        for key, shard in shards[name].items():
            if key.startswith(ROUTER):
                shard.replica_id = (stage, *shard.replica_id[1:])
    return shards


def without_missing_states(shards: dict[str, Any], stored: Container[str]) -> dict[str, Any]:
    """``shards`` of Transformer Engine's modules, less their FP8 states where a model without it was saved.

    Its modules ask for such a state always; in BF16 it is empty.

    Args:
        stored: the keys of the objects of the checkpoint.
    """
    return {
        name: {
            key: shard
            for key, shard in chunk.items()
            if not key.endswith("_extra_state") or shard.unique_key in stored
        }
        for name, chunk in shards.items()
    }


def sharding() -> dict[str, Any]:
    """How Megatron's optimizers are to cut their state: so that any layout loads it."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": runtime.groups().dp_cp,
    }
