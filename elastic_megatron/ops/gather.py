"""Permute or slice a tensor by its layout: both are gathers of source positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..space import TensorLayout


def gather_tensor(
    tensor: Tensor, layout: TensorLayout, sizes: Mapping[str, int], kept: Mapping[str, Sequence[int]]
) -> Tensor:
    """The tensor with the components ``kept`` along every dimension they live in.

    Args:
        tensor: shaped ``layout.shape(sizes)``.
        sizes: the tensor's sizes (every field its layout names).
        kept: for each changed field the source components in their new order.

    Raises:
        ValueError: the tensor is not of that shape.
    """
    if tuple(tensor.shape) != layout.shape(sizes):
        raise ValueError(f"{layout.name} has shape {tuple(tensor.shape)}, expected {layout.shape(sizes)}")
    for dim in range(tensor.dim()):
        positions = layout.gather(dim, sizes, kept)
        if positions is not None and positions != list(range(tensor.shape[dim])):
            tensor = tensor.index_select(dim, torch.tensor(positions, device=tensor.device))
    return tensor
