"""Rounding what linears are multiplied with, as kernels do that read quantised weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from .formats import Format
from .packing import rounded


@contextmanager
def rounding(form: Format, linears: Iterable[tuple[nn.Module, Tensor]]) -> Iterator[None]:
    """Inside, each linear rounds its first argument [..., columns] to the format first; for evaluation.

    The hooks come after those that a module has, so that the elastic masks' are done: a channel that is masked is a
    zero in its block, as if it had been cut off.

    Args:
        linears: with the fp32 scale of their inputs, ``input_scale`` of the checkpoint.

    Raises ``AssertionError`` for a linear with a norm fused into it, whose input is not what is multiplied.
    """
    with ExitStack() as stack:
        for module, scale in linears:
            assert not hasattr(module, "layer_norm_weight"), f"{type(module).__name__} normalises its input"
            hook = module.register_forward_pre_hook(_Rounds(form, scale))
            stack.callback(hook.remove)
        yield


def round_alike(module: nn.Module, original: nn.Module, _: tuple[int, int] | None = None) -> None:
    """Let a linear that was cut out of another one round its inputs as that one does now."""
    for hook in original._forward_pre_hooks.values():
        if isinstance(hook, _Rounds) and hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook)


class _Rounds:
    def __init__(self, form: Format, scale: Tensor) -> None:
        self._form, self._scale = form, scale

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        scale = self._scale = self._scale.to(args[0].device)
        return (rounded(self._form, args[0], scale), *args[1:])
