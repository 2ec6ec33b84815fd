"""What Megatron's overlapped communication must be told where submodels run beside the model that it wraps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..blocks import SlicedModel


class Overlap:
    """Stands for the hooks that ``DistributedDataParallel`` has on modules and parameters.

    Sliced execution calls no module of the wrapped model, and reaches only the parameters that a submodel has, of which
    ranks may run different ones. So all parameters are asked for at once, in an order that does not depend on what is
    run; each is waited for where it is cut out. A gradient that was added is reported, and after the last micro-batch
    all others are.

    Args:
        ddp: a wrapped pipeline chunk. Where it gathers parameters, it must leave asking for them to others
            (``align_param_gather``).
    """

    def __init__(self, ddp: Any) -> None:
        self.settings, self.groups = ddp.ddp_config, ddp.param_to_bucket_group
        # what is read first is needed first: the budget router's parameters before each step, then module by module
        named = sorted(ddp.module.named_parameters(), key=lambda pair: "budget_router." not in pair[0])
        self.order = list(dict.fromkeys(self.groups[p] for _, p in named if p in self.groups))
        assert self.settings.align_param_gather or not self.settings.overlap_param_gather

    def ask(self) -> None:
        """Start gathering all parameters that are not on their way or here."""
        for group in self.order if self.settings.overlap_param_gather else ():
            if not group.param_gather_dispatched:
                group.start_param_sync()

    def arrived(self, tensor: Tensor) -> None:
        """Wait until this rank has a parameter."""
        if self.settings.overlap_param_gather and tensor in self.groups:
            self.groups[tensor].finish_param_sync(skip_next_bucket_dispatch=True)

    def all_arrived(self) -> None:
        """Wait for what no micro-batch of this step read."""
        for group in self.order if self.settings.overlap_param_gather else ():
            group.finish_param_sync(skip_next_bucket_dispatch=True)

    def landed(self, parameter: nn.Parameter) -> None:
        """A micro-batch has added all that it adds to the gradient of a parameter."""
        if self.settings.overlap_grad_reduce:
            self._ready(parameter)

    def rest(self) -> None:
        """The last micro-batch is done: what has not been reported gets nothing more."""
        if self.settings.overlap_grad_reduce:
            for parameter in self.groups:
                self._ready(parameter)

    def _ready(self, parameter: nn.Parameter) -> None:
        group = self.groups[parameter]
        if parameter not in group.per_param_grad_ready_counts:
            group.register_grad_ready(parameter)


class Submodels(SlicedModel):
    """``SlicedModel`` of the student in a wrapped ``DistilledChunk``."""

    def __init__(self, ddp: Any, **kwargs: Any) -> None:
        self.overlap = Overlap(ddp)
        arrived = self.overlap.arrived if ddp.ddp_config.overlap_param_gather else None
        super().__init__(ddp.module.module, landed=self.overlap.landed, arrived=arrived, **kwargs)

    def refresh(self) -> None:
        super().refresh()
        self.overlap.ask()

    def land(self) -> None:
        super().land()
        self.overlap.all_arrived()
        self.overlap.rest()
