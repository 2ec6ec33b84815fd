"""What the ranks do in the ranking tests, and the small odd model they do it with."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.stored import model_tensors
from elastic_megatron.importance import Ranking
from elastic_megatron.space import ElasticSpace, ParentShape

# sizes that ranks share divide by them, and otherwise are as odd as they can be
PARENT = ParentShape(
    "MEM*E-M",
    hidden_size=35,
    vocab_size=54,
    ffn_hidden_size=22,
    moe_ffn_hidden_size=14,
    moe_shared_expert_intermediate_size=26,
    num_moe_experts=8,
    moe_router_topk=2,
    moe_router_topk_scaling_factor=2.5,
    mamba_num_heads=12,
    mamba_head_dim=5,
    mamba_state_dim=7,
    mamba_num_groups=2,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=5,
)
CHOICES = {
    "hidden_size": [16],
    "ffn_hidden_size": [2],
    "moe_ffn_hidden_size": [2],
    "moe_shared_expert_intermediate_size": [2],
    "num_moe_experts": [4],
    "mamba_num_heads": [4],
    "mamba_head_dim": [3],
    "mamba_state_dim": [4],
    "num_attention_heads": [2],
}
LANES = {
    "ffn_hidden_size": 2,
    "moe_ffn_hidden_size": 2,
    "moe_shared_expert_intermediate_size": 2,
    "num_moe_experts": 4,
}
# more than any row or column of the model, less than its tensors
_TILE = 300
_GROUPS = ("tensor", "sequence", "pipeline", "context", "expert", "expert_tensor")


def space_of(parent: ParentShape) -> ElasticSpace:
    """Every axis that the model has is elastic."""
    choices = {a: widths for a, widths in CHOICES.items() if parent.size(a)}
    choices["num_layers"] = [parent.num_layers - 2]
    return ElasticSpace.build(parent, choices, {a: n for a, n in LANES.items() if a in choices})


def random_state(parent: ParentShape, seed: int) -> dict[str, Tensor]:
    """Loud weights in fp32, no norm of ones and no bias of zeros."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for tensor in model_tensors(parent):
        name, noise = tensor.name, torch.randn(tensor.shape, generator=generator)
        if noise.dim() == 2:
            state[name] = noise * 2 / noise.shape[1] ** 0.5
        elif name.endswith("A_log"):
            state[name] = 1 + 0.5 * noise
        elif "norm" in name or name.endswith(".D"):
            state[name] = 1 + 0.3 * noise
        else:
            state[name] = 0.3 * noise
    return state


class _KeepDouble(TorchFunctionMode):
    """``.float()`` of fp64 is the identity: Megatron rounds router logits to fp32 whatever the model's type."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float and args[0].dtype is torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


class _Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made inside this context; views of what was there are not made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        new = [t.numel() for t in made if t.untyped_storage().data_ptr() not in given]
        self.numel = max([self.numel, *new])
        return out


def built(parent: ParentShape, parallel: Mapping[str, Any], dtype: torch.dtype) -> list[Any]:
    """This rank's chunks under the groups of a recipe's ``parallel`` section."""
    from elastic_megatron import runtime
    from elastic_megatron.blocks import build_chunks, build_model

    runtime.start(seed=1, **{key: parallel[key] for key in _GROUPS if key in parallel})
    how = {"dtype": dtype, "moe_token_dispatcher_type": parallel.get("dispatcher", "alltoall")}
    return build_chunks(lambda vp_stage: build_model(parent, vp_stage=vp_stage, **how).eval())


def own_batches(ids: Tensor, rows: int) -> list[dict[str, Tensor]]:
    """This data-parallel rank's block of the sequences, in batches of ``rows``."""
    from elastic_megatron import runtime

    replicas = runtime.groups().dp
    return [{"tokens": b} for b in ids.chunk(replicas.size())[replicas.rank()].split(rows)]


def ranked(
    parallel: Mapping[str, Any], hf: Path, ids: Tensor, axes: Sequence[str], *, rows: int, iterative: bool
) -> Ranking:
    """The ranking of the model in a Hugging Face directory; two sequences rank its layers."""
    from elastic_megatron.checkpoint.source import open_source
    from elastic_megatron.importance import collect

    source = open_source(hf)
    chunks = built(source.manifest.shape, parallel, torch.float64)
    source.fill(chunks)
    with _KeepDouble():
        return collect(
            chunks,
            source.manifest.shape,
            own_batches(ids, rows),
            axes=axes,
            head_dim_kept=3,
            depth_batches=2 // rows,
            depth_iterative=iterative,
        )


def filled_and_sorted(
    parallel: Mapping[str, Any],
    hf: Path,
    space: ElasticSpace,
    ranking: Ranking,
    checkpoints: Path,
    ids: Tensor,
) -> tuple[float, float]:
    """Save the model of a Hugging Face directory as iteration 0, and sorted as iteration 1.

    Returns the square sum of all logits, and that of what sorting changed in them.
    """
    from elastic_megatron.blocks import forward_only
    from elastic_megatron.checkpoint import distributed, shards
    from elastic_megatron.checkpoint.sort import sort_model
    from elastic_megatron.checkpoint.source import open_source

    source = open_source(hf)
    chunks = built(source.manifest.shape, parallel, torch.float32)
    source.fill(chunks)
    manifest, batches = replace(source.manifest, space=space), own_batches(ids, len(ids))
    distributed.save(checkpoints, 0, chunks, manifest)
    before = forward_only(chunks, batches, lambda _, logits: logits)
    held = max(t.tensor.numel() for chunk in chunks for t in shards.shards(chunk, source.manifest.shape))
    assert held > 3 * _TILE, "tensors are no larger than tiles"
    with patch.object(shards, "TILE", _TILE), _Largest() as largest:
        sort_model(chunks, space, ranking)
    assert largest.numel <= _TILE, "a rank made more of a tensor than a tile"
    after = forward_only(chunks, batches, lambda _, logits: logits)
    distributed.save(checkpoints, 1, chunks, manifest)
    sums = torch.zeros(2, dtype=torch.float64)
    for old, new in zip(before, after, strict=True):
        sums += torch.stack([old.double().square().sum(), (new - old).double().square().sum()])
    torch.distributed.all_reduce(sums)
    total, changed = sums.tolist()
    return total, changed


def loaded(*folders: Path) -> list[dict[str, Tensor]]:
    """The weights of checkpoints of one model, in one process."""
    from elastic_megatron.checkpoint import distributed
    from elastic_megatron.ops.locate import weights

    states = []
    for folder in folders:
        chunks = built(Manifest.read(folder / "elastic.json").shape, {}, torch.float32)
        distributed.load(folder, chunks)
        states.append(weights(chunks[0].state_dict()))
    return states


def exchanged(whole: Tensor, dim: int, source: Sequence[int]) -> Tensor:
    """This rank's part of ``exchange``, made from its part of ``whole``."""
    from elastic_megatron import runtime
    from elastic_megatron.checkpoint.shards import exchange

    runtime.start()
    group = torch.distributed.group.WORLD
    return exchange(whole.chunk(group.size(), dim)[group.rank()], dim, torch.tensor(source), group)


def commanded(*arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of ``elastic-megatron ARGUMENTS`` on this rank."""
    from elastic_megatron.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()
