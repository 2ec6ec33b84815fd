"""Megatron tensors under their Hugging Face names, both ways, by the fact table.

Hub names of ``nemotron_h``: ``backbone.embeddings.weight``, ``backbone.layers.N.norm.weight``,
``backbone.layers.N.mixer.…``, ``backbone.norm_f.weight``, ``lm_head.weight``. Every tensor has the same order
on both sides except those the table calls *interleaved*: Megatron's QKV holds one ``[q | k | v]`` a KV group,
Hugging Face one tensor each of q, k and v.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cost.sizes import parent_fields
from ..errors import UserError
from ..space import ParentShape, TensorLayout, ends, tensors_of
from .slice import locate

HEAD = ends(tied=False)[-1].hf or ""


@dataclass(frozen=True)
class HFTensor:
    """One Megatron tensor and the Hugging Face tensors it consists of: ``parts`` are (name, shape)."""

    name: str
    layout: TensorLayout
    parts: tuple[tuple[str, tuple[int, ...]], ...]


def hf_tensors(parent: ParentShape) -> Iterator[HFTensor]:
    """Every tensor of a model of that shape, in Megatron's order, under both names.

    The extra ``lm_head.weight`` that ``to_hf`` writes for a tied model is not listed.
    """
    sizes = parent_fields(parent)
    for layout in ends(parent.tie_embeddings):
        yield HFTensor(layout.name, layout, _parts(layout, sizes, "", None))
    for layer, symbol in enumerate(parent.hybrid_layer_pattern):
        for layout in tensors_of(symbol, sizes):
            for e in range(parent.num_moe_experts) if layout.per_expert else (None,):
                name = f"decoder.layers.{layer}.{layout.name.format(e=e)}"
                yield HFTensor(name, layout, _parts(layout, sizes, f"backbone.layers.{layer}.", e))


def to_hf(parent: ParentShape, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The Hugging Face tensors of one Megatron tensor (any spelling of its name that the table knows).

    A tied model also gets its own ``lm_head.weight``: transformers 5.16 ties nothing in ``nemotron_h``
    (``NemotronHForCausalLM._tied_weights_keys`` is empty) and would initialise the head at random.

    Raises ``UserError`` for an unknown name or another shape than the model's.
    """
    layer, layout, expert = locate(parent, name)
    sizes = parent_fields(parent)
    check_shape(name, tensor.shape, layout.shape(sizes))
    prefix = "" if layer is None else f"backbone.layers.{layer}."
    names = [n for n, _ in _parts(layout, sizes, prefix, expert)]
    tensors = [tensor] if layout.hf else _split(layout, sizes, tensor)
    out = list(zip(names, tensors, strict=True))
    if parent.tie_embeddings and layout.role == "lookup":
        out.append((HEAD, tensor.clone()))
    return out


def from_hf(
    parent: ParentShape, read: Callable[[str], Tensor], wanted: Container[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Every Megatron tensor of a model, one at a time, from its Hugging Face tensors.

    Args:
        read: returns the tensor of a Hugging Face name.
        wanted: Megatron names; others are not read. By default all are.

    Raises ``UserError`` for a tensor of another shape than the model's.
    """
    sizes = parent_fields(parent)
    for item in hf_tensors(parent):
        if wanted is not None and item.name not in wanted:
            continue
        pieces = []
        for hf_name, shape in item.parts:
            pieces.append(read(hf_name))
            check_shape(hf_name, pieces[-1].shape, shape)
        yield item.name, pieces[0] if item.layout.hf else _join(item.layout, sizes, pieces)


def check_shape(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Raise ``UserError`` naming the tensor unless the two shapes agree."""
    if tuple(found) != tuple(wanted):
        raise UserError(
            f"tensor {name!r} has shape {list(found)}, the model's sizes say {list(wanted)}; "
            "the weights and the configuration belong to different models"
        )


def _parts(
    layout: TensorLayout, sizes: Mapping[str, Any], prefix: str, expert: int | None
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    shape = layout.shape(sizes)
    if layout.hf:
        return ((prefix + layout.hf.format(e=expert), shape),)
    return tuple((f"{prefix}{s.hf}", (s.size(sizes), *shape[1:])) for s in layout.dims[0])


def _split(layout: TensorLayout, sizes: Mapping[str, Any], tensor: Tensor) -> list[Tensor]:
    """The segments of dimension 0, gathered from the interleaved parts that each hold a share of them."""
    parts = sizes[layout.interleave] if layout.interleave else 1
    shares = [s.size(sizes) // parts for s in layout.dims[0]]
    return [piece.flatten(0, 1) for piece in tensor.unflatten(0, (parts, -1)).split(shares, dim=1)]


def _join(layout: TensorLayout, sizes: Mapping[str, Any], pieces: Sequence[Tensor]) -> Tensor:
    """Inverse of ``_split``."""
    parts = sizes[layout.interleave] if layout.interleave else 1
    return torch.cat([piece.unflatten(0, (parts, -1)) for piece in pieces], dim=1).flatten(0, 1)
