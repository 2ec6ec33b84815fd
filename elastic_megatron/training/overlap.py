"""What Megatron's overlapped communication must be told where submodels run beside the model that it wraps."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..blocks import SlicedModel


class Overlap:
    """Stands for the hooks that ``DistributedDataParallel`` has on modules and parameters.

    Sliced execution calls no module of the wrapped model, and reaches only the parameters that a submodel has. So
    weights are waited for before they are cut out, a gradient that was added is reported, and after the last
    micro-batch all others are.

    Args:
        ddp: a wrapped pipeline chunk.
    """

    def __init__(self, ddp: Any) -> None:
        self.settings, self.groups = ddp.ddp_config, ddp.param_to_bucket_group

    def weights(self) -> None:
        """Wait until this rank has all parameters."""
        if self.settings.overlap_param_gather:
            for group in dict.fromkeys(self.groups.values()):
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
        super().__init__(ddp.module.module, landed=self.overlap.landed, **kwargs)

    def refresh(self) -> None:
        super().refresh()
        self.overlap.weights()

    def land(self) -> None:
        super().land()
        self.overlap.rest()
