"""Adam with the state layout of Transformer Engine's and Apex's ``FusedAdam``."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class GroupStepAdam(torch.optim.Optimizer):
    """Adam or AdamW whose ``step`` counter lives in the parameter group.

    Per parameter there are only ``exp_avg`` and ``exp_avg_sq``, as in ``FusedAdam``, so optimizer
    checkpoints move between a CPU run and a production run.  ``torch.optim.AdamW``, to which Megatron
    falls back, keeps a ``step`` per parameter, which its ``DistributedOptimizer`` saves but cannot load
    (``distrib_optimizer.py``: ``assert len(steps) == 1``, then ``KeyError: 'step'``).

    The update is that of Loshchilov & Hutter (arXiv 1711.05101) with ``adam_w_mode``, else L2
    regularisation added to the gradient.  Unknown keyword arguments of ``FusedAdam`` are ignored.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, bias_correction=bias_correction
        )
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "Megatron's optimizers pass no closure"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        gradients = [p.grad for p in parameters]
        first = [self.state[p]["exp_avg"] for p in parameters]
        second = [self.state[p]["exp_avg_sq"] for p in parameters]
        lr, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        if decay and self.adam_w_mode:
            torch._foreach_mul_(parameters, 1 - lr * decay)
        elif decay:
            gradients = torch._foreach_add(gradients, parameters, alpha=decay)
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        correction1 = correction2 = 1.0
        if group["bias_correction"]:
            correction1, correction2 = 1 - beta1 ** group["step"], 1 - beta2 ** group["step"]
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, correction2**0.5)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(parameters, first, denominator, -lr / correction1)
