"""Parameter attributes that must be set between building a model and wrapping it in DDP."""

import torch


def one_optimizer_layout(model: torch.nn.Module) -> None:
    """Mark every expert parameter as expert-parallel (``allreduce = False``) in every layout.

    Megatron does so only where EP > 1, and ``get_megatron_optimizer`` gives parameters without
    ``allreduce`` an optimizer of their own: a run at EP = 1 saves one optimizer, a run at EP > 1 two,
    and loading one into the other fails (``Expected 2 entries in state dict``).  With the mark set
    always, both save two, and optimizer states reshard between any two layouts.  At EP = 1 the expert
    data-parallel group equals the data-parallel group, so gradients are reduced as before.

    Call it on the bare model, before ``DistributedDataParallel`` sorts parameters into buffers.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]
