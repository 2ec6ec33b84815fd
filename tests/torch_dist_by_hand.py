"""``torch_dist`` checkpoints written by hand: any chunks, any names, and the names of Megatron by the slow way."""

from __future__ import annotations

import io
import itertools
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from elastic_megatron.space import ParentShape

Cuts = Sequence[Sequence[int]]  # of each dimension, the sizes of its parts


def archive(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def boxes(tensor: Tensor, cuts: Cuts) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """(offsets, values) of the parts of a tensor."""
    stretches = [list(itertools.pairwise([0, *itertools.accumulate(parts)])) for parts in cuts]
    for box in itertools.product(*stretches):
        yield tuple(a for a, _ in box), tensor[tuple(slice(a, b) for a, b in box)].clone()


def write_by_hand(
    folder: Path,
    tensors: Mapping[str, Tensor],
    cuts: Mapping[str, Cuts] | None = None,
    *,
    files: int = 1,
    objects: Iterable[str] = (),
    saved: Callable[[Tensor], bytes] = archive,
) -> None:
    """A checkpoint by hand: chunk after chunk, dealt to files."""
    folder.mkdir(parents=True, exist_ok=True)
    items: dict[str, Any] = {key: BytesStorageMetadata() for key in objects}
    where, contents = {}, [b"left by another writer"[: 7 * f] for f in range(files)]
    for key, tensor in tensors.items():
        chunks = []
        for offsets, values in boxes(tensor, (cuts or {}).get(key) or [[n] for n in tensor.shape]):
            data, file = saved(values), len(where) % files
            where[MetadataIndex(key, offsets)] = _StorageInfo(
                f"__{file}_0.distcp", len(contents[file]), len(data)
            )
            contents[file] += data
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), values.shape))
        items[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.shape, chunks)
    for file, content in enumerate(contents):
        (folder / f"__{file}_0.distcp").write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata(items, None, where)))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')


def edit(folder: Path, change: Callable[[Metadata], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def keys_of_megatron(state: Mapping[str, Tensor], shape: ParentShape) -> dict[str, Tensor]:
    """The keys that Megatron's writer gives the tensors of a module built from the local spec; the slow way."""
    inner, states = (
        shape.mamba_num_heads * shape.mamba_head_dim,
        shape.mamba_num_groups * shape.mamba_state_dim,
    )
    parts = {"in_proj.weight": (inner, inner, states, states, shape.mamba_num_heads)}
    parts["conv1d.weight"] = parts["conv1d.bias"] = (inner, states, states)
    fused = {
        "M": ("norm.weight", "mixer.in_proj.layer_norm_weight"),
        "*": ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        "-": ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        "E": ("", ""),
    }
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name)
        if found is None:
            out[name] = tensor
            continue
        layer, local = f"decoder.layers.{found[1]}", found[2].replace("conv1d_", "conv1d.")
        plain, with_next = fused[shape.hybrid_layer_pattern[int(found[1])]]
        split = parts.get(local.removeprefix("mixer."))
        if "local_experts.0." in local:
            others = [name.replace("experts.0.", f"experts.{e}.") for e in range(shape.num_moe_experts)]
            out[f"{layer}.{local.replace('local_experts.0.', 'experts.')}"] = torch.stack(
                [state[n] for n in others]
            )
        elif split is not None:
            labels = "zxBCt"[-5 if len(split) == 5 else 1 :][: len(split)]
            for label, part in zip(labels, tensor.split(split), strict=True):
                out[f"{layer}.{local}.{label.replace('t', 'dt')}"] = part
        elif "local_experts" not in local:
            out[f"{layer}.{with_next if local == plain else local}"] = tensor
    return out
