"""Training whose parameters arrive late: gathered at once, but shown only to who waits for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import training_jobs
from megatron.core import distributed as megatron
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

# numbers of a bucket: small enough that layers have their own
BUCKET = 1500
Event = tuple[str, int | str]


class Late:
    """Stands for a gathering that is under way: until it is waited for, the parameters are not numbers."""

    def __init__(self, group: Any, number: int, events: list[Event]) -> None:
        self.number, self.events = number, events
        self.held: list[tuple[Tensor, Tensor]] = [(b.param_data, b.param_data.clone()) for b in group.buckets]
        for data, _ in self.held:
            data.fill_(float("nan"))

    def wait(self) -> None:
        self.events.append(("wait", self.number))
        for data, arrived in self.held:
            data.copy_(arrived)


@contextmanager
def late(events: list[Event]) -> Iterator[None]:
    """Inside, gatherings are ``Late``; noted are what is asked for, waited for and computed, in this order."""
    stock, numbers = _ParamAndGradBucketGroup.start_param_sync, dict[int, int]()

    def start(group: Any, force_sync: bool = False) -> None:
        stock(group, force_sync)
        if group.param_gather_handle is not None:
            group.param_gather_handle.wait()
            number = numbers.setdefault(id(group), len(numbers))
            events.append(("ask", number))
            group.param_gather_handle = Late(group, number, events)

    def done(module: nn.Module, _: Any, __: Any) -> None:
        if next(module.parameters(recurse=False), None) is not None:
            events.append(("done", type(module).__name__))

    hook = register_module_forward_hook(done)
    with patch.object(_ParamAndGradBucketGroup, "start_param_sync", start):
        try:
            yield
        finally:
            hook.remove()


def trained(recipe: str, *, delayed: bool) -> dict[str, Any]:
    """As ``training_jobs.trained``, with small buckets; and the events, where parameters are delayed."""
    events: list[Event] = []
    small = partial(megatron.DistributedDataParallelConfig, bucket_size=BUCKET)
    with patch.object(megatron, "DistributedDataParallelConfig", small):
        if not delayed:
            return training_jobs.trained(recipe)
        with late(events):
            return training_jobs.trained(recipe) | {"events": events}
