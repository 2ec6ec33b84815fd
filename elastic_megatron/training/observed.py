"""What calibration observes of linears, on this rank and over all of them. No ModelOpt."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import runtime
from ..errors import UserError

UNSEEN = -1.0


class Largest:
    """ModelOpt's max calibrator, whose assertion about NaN would end one rank while the others wait for it.

    Here what is not finite counts as infinite, and all ranks hear of it.
    """

    def __init__(self) -> None:
        self._found: Tensor | None = None

    @torch.no_grad()
    def collect(self, values: Tensor) -> None:
        """The largest magnitude of [...] and of what was collected before."""
        if not values.numel():  # experts of which none has a token
            return
        largest = values.abs().amax().float().nan_to_num(nan=math.inf, posinf=math.inf)
        self._found = largest if self._found is None else torch.maximum(self._found, largest)

    def compute_amax(self) -> Tensor | None:
        return self._found

    def reset(self) -> None:
        self._found = None


def collected(quantizer: Any) -> Tensor:
    """The largest magnitude that a quantiser saw, ``UNSEEN`` where nothing came by."""
    found = quantizer._calibrator.compute_amax()
    return torch.tensor(UNSEEN) if found is None else found.detach().float().reshape(()).cpu()


def grouped(module: nn.Module) -> int:
    """How many experts' linears a module is; 0 where it is one linear."""
    return getattr(module, "num_gemms", 0)


class Reached:
    """Notes which of grouped experts get tokens, by their quantisers, which submodels share."""

    def __init__(self) -> None:
        self.quantizers: set[nn.Module] = set()

    def __call__(self, module: Any, args: tuple[Any, ...]) -> None:
        splits = torch.as_tensor(args[1]).tolist()
        self.quantizers |= {q for q, n in zip(module.weight_quantizer, splits, strict=True) if n}


def reached_of(module: nn.Module) -> Reached:
    """What is noted of grouped experts."""
    (found,) = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Reached))
    return found


def numbered[Key: Hashable](keys: Iterable[Key]) -> dict[Key, int]:
    """From 0, in the order in which they come first."""
    return {key: i for i, key in enumerate(dict.fromkeys(keys))}


def check_finite(kinds: Mapping[tuple[int | None, str], int], largest: Tensor) -> None:
    """Raise ``UserError`` with the first kind of linears, by its place in ``largest``, that saw what is not finite."""
    for (layer, name), index in kinds.items():
        if largest[index].isinf():
            where = name if layer is None else f"{name} of decoder.layers.{layer}"
            raise UserError(
                f"inputs of {where} are not finite on the calibration data: the model overflows; check "
                "model.checkpoint, model.dtype and data.train"
            )


def largest_of_stage(values: Tensor, device: torch.device) -> None:
    """The maximum over all ranks of this pipeline stage, in place."""
    groups = runtime.groups()
    moved = values.to(device)
    for group in (groups.tp, groups.dp_cp):
        torch.distributed.all_reduce(moved, torch.distributed.ReduceOp.MAX, group)
    values.copy_(moved)


def merged[Value](own: Mapping[str, Value]) -> dict[str, Value]:
    """What all ranks have, which agree where they have the same."""
    every: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, own)
    return {name: value for each in every for name, value in each.items()}
