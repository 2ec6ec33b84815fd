"""Tensors on their way to the device."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def sent(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of the CPU on ``device``.

    To a GPU they go from pinned memory, so that the host goes on while they travel; what is computed from them later
    waits on the GPU's own stream.
    """
    if device.type != "cuda":
        return {key: tensor.to(device) for key, tensor in tensors.items()}
    return {key: tensor.pin_memory().to(device, non_blocking=True) for key, tensor in tensors.items()}
