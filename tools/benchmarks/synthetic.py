"""An elastic Hugging Face directory with the names and shapes of Nemotron 3 Nano and no trained weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
import torch

from elastic_megatron.checkpoint.hf_config import hf_config, with_dtype
from elastic_megatron.checkpoint.hf_names import hf_pieces
from elastic_megatron.checkpoint.hf_read import CONFIG, ELASTIC_CONFIG, INDEX
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.resolve import budgets
from elastic_megatron.checkpoint.stored import model_tensors, stored_shapes
from elastic_megatron.errors import UserError
from elastic_megatron.recipe import load
from elastic_megatron.space import ElasticSpace, ParentShape, SubmodelSpec

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "nemotron3_nano_30b" / "plan.yaml"
# widths of the recipe with about 23 and 12 billion parameters (22.6 and 12.4), the smaller nested in the larger
SUBMODELS: Mapping[str, Mapping[str, int]] = {
    "23b": {"hidden_size": 2304, "moe_ffn_hidden_size": 1536, "num_moe_experts": 128, "mamba_num_heads": 56},
    "12b": {"hidden_size": 2048, "moe_ffn_hidden_size": 1024, "num_moe_experts": 112, "mamba_num_heads": 56},
}
MAX_SHARD_BYTES = 5_000_000_000
_NEAR = 0.05
_MIN_EXPERTS, _MIN_VOCAB, _VOCAB_STEP = 32, 1024, 128
_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
# numbers of 2 bytes; prime, so that a tensor does not repeat itself at a stride of the model
_POOL = 33_554_393


def nano() -> ParentShape:
    """The whole model's shape, from the recipe."""
    sizes = load(RECIPE).model.sizes
    assert sizes is not None
    return ParentShape.from_dict(sizes.model_dump())


def taken(gigabytes: float) -> ParentShape:
    """A model of about ``gigabytes`` (1e9 bytes) whose tensors have the true shapes as far as that goes.

    The first layers of the true pattern, at least one each of M, E and *; where that is more than 5 % off, fewer
    experts; below 32 experts a smaller vocabulary.

    Raises ``UserError`` where the smallest such model is larger.
    """
    full, wanted = nano(), gigabytes * 1e9
    patterns = ["ME*"] + [full.hybrid_layer_pattern[:n] for n in range(6, full.num_layers + 1)]
    shapes = [full.override(hybrid_layer_pattern=p) for p in patterns]
    nearest = min(shapes, key=lambda s: abs(nbytes(s) - wanted))
    if abs(nbytes(nearest) - wanted) <= _NEAR * wanted or nbytes(full) < wanted:
        return nearest
    shape = next(s for s in shapes if nbytes(s) > wanted)
    experts = range(full.num_moe_experts, _MIN_EXPERTS - 1, -8)
    shape = min((shape.override(num_moe_experts=e) for e in experts), key=lambda s: abs(nbytes(s) - wanted))
    if nbytes(shape) <= (1 + _NEAR) * wanted:
        return shape
    excess = nbytes(shape) - wanted
    per_token = (nbytes(shape) - nbytes(shape.override(vocab_size=1))) / (shape.vocab_size - 1)
    vocab = round((shape.vocab_size - excess / per_token) / _VOCAB_STEP) * _VOCAB_STEP
    if vocab < _MIN_VOCAB:
        least = nbytes(shape.override(vocab_size=_MIN_VOCAB)) / 1e9
        raise UserError(
            f"--gigabytes {gigabytes:g} is too small for one layer of each type; give {least:.2f} or more"
        )
    return shape.override(vocab_size=vocab)


def tiny() -> ParentShape:
    """The same kinds of layers in a few megabytes, to have everything imported before the clock starts."""
    return nano().override(
        hybrid_layer_pattern="ME*",
        hidden_size=42,
        vocab_size=64,
        moe_ffn_hidden_size=29,
        moe_shared_expert_intermediate_size=58,
        num_moe_experts=16,
        mamba_head_dim=2,
    )


def family(shape: ParentShape) -> Manifest:
    """The recipe's space and the two submodels over ``shape``, every width in proportion to the whole model's."""
    recipe, full = load(RECIPE), nano()

    def scaled(axis: str, width: int) -> int:
        lanes = recipe.space.lanes.get(axis) or shape.groups(axis)
        return max(1, round(width * shape.size(axis) / full.size(axis) / lanes)) * lanes

    choices = {a: [scaled(a, w) for w in widths] for a, widths in recipe.space.choices.items()}
    space = ElasticSpace.build(shape, choices, recipe.space.lanes)
    submodels = {"30b": space.full()}
    for name, widths in SUBMODELS.items():
        submodels[name] = SubmodelSpec.of({a: scaled(a, w) for a, w in widths.items()})
    return Manifest(shape=shape, space=space, budgets=budgets(recipe), submodels=submodels)


@dataclass(frozen=True)
class HFEntry:
    """A tensor of the directory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def entries(shape: ParentShape) -> Iterator[HFEntry]:
    """Every tensor: bf16, but fp32 where the fact table says so."""
    tensors = list(model_tensors(shape))
    wide = {piece.key for tensor in tensors if tensor.layout.fp32 for piece in hf_pieces(tensor)}
    for name, size in stored_shapes(tensors, hf_pieces).items():
        yield HFEntry(name, size, torch.float32 if name in wide else torch.bfloat16)


def nbytes(shape: ParentShape) -> int:
    """Bytes of the weights."""
    layers = Counter(shape.hybrid_layer_pattern)
    once = "".join(layers)
    return sum(
        prod(t.shape) * (4 if t.layout.fp32 else 2) * (1 if t.layer is None else layers[once[t.layer]])
        for t in model_tensors(shape.override(hybrid_layer_pattern=once))
    )


def write(
    directory: Path, shape: ParentShape, *, max_shard_bytes: int = MAX_SHARD_BYTES, empty: bool = False
) -> None:
    """Write the directory; ``directory`` must not exist.

    Args:
        max_shard_bytes: of a weight file.
        empty: leave the weights out as holes of sparse files, which take no space.
    """
    directory.mkdir(parents=True)
    pool = memoryview(b"") if empty else _pool()
    shards = list(_shards(shape, max_shard_bytes))
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        where |= {entry.name: name for entry in shard}
        with open(directory / name, "wb", buffering=0) as file:
            file.write(_header(shard))
            if empty:
                file.truncate(file.tell() + sum(entry.nbytes for entry in shard))
            else:
                for entry in shard:
                    _fill(file, entry, pool)
    index = {"metadata": {"total_size": nbytes(shape)}, "weight_map": where}
    (directory / INDEX).write_text(json.dumps(index))
    manifest = family(shape)
    config = with_dtype(hf_config(manifest, shape, code=()), torch.bfloat16)
    (directory / CONFIG).write_text(json.dumps(config, indent=2))
    manifest.write(directory / ELASTIC_CONFIG)


def describe(shape: ParentShape) -> dict[str, Any]:
    """What was taken of the whole model, for the record."""
    return {
        "layers": shape.hybrid_layer_pattern,
        "experts": shape.num_moe_experts,
        "vocabulary": shape.vocab_size,
        "tensors": sum(1 for _ in entries(shape)),
        "bytes": nbytes(shape),
    }


def _shards(shape: ParentShape, max_bytes: int) -> Iterator[list[HFEntry]]:
    group: list[HFEntry] = []
    size = 0
    for entry in entries(shape):
        if group and size + entry.nbytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(entry)
        size += entry.nbytes
    yield group


def _header(shard: list[HFEntry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in shard:
        start, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pool() -> memoryview:
    """Random bytes that are finite numbers below 2, read as bf16 and as fp32: the exponent's highest bit is 0."""
    halves = np.random.default_rng(0).integers(0, 1 << 16, _POOL, np.uint16)
    return memoryview(halves & 0xBFFF).cast("B")


def _fill(file: BinaryIO, entry: HFEntry, pool: memoryview) -> None:
    """Write a tensor: the pool, again and again, from a place that depends on the tensor's name."""
    start, left = 4 * (crc32(entry.name.encode()) % (len(pool) // 4)), entry.nbytes
    while left:
        part = pool[start : start + left]
        left -= file.write(part)
        start = (start + len(part)) % len(pool)
