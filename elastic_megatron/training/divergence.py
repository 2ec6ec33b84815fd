"""What of a training run is not finite, and what follows: no update, no checkpoint, an end or a way back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DivergedError
from ..recipe.objective import Loss
from ..recipe.training import Stage, tokens_after


class DivergenceWatch:
    """Judges every step by numbers that are the same on all ranks, so that these go on or leave together.

    A step whose loss, distillation loss, router loss or gradient norm is not finite gives no update. After
    ``loss.divergence_patience`` of them in a row, or where the last step of all is one, the run has diverged: it
    ends, or goes back to the last checkpoint and passes over the samples of those steps.

    Args:
        state: what ``state`` returned, of the checkpoint that the run resumes from.

    ``skipped`` are the steps (0-based) that gave or give no update.
    """

    def __init__(self, settings: Loss, stages: Sequence[Stage], state: Mapping[str, Any]) -> None:
        self.settings, self.stages = settings, stages
        self.skipped: set[int] = set(state.get("skipped", ()))
        self.rewinds = int(state.get("rewinds", 0))
        self.streak: list[int] = []
        self._names: dict[str, None] = {}

    def judge(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Names of the values of a step that are not finite."""
        found = [name for name, value in values.items() if not math.isfinite(value)]
        if found:
            self.skipped.add(step)
            self.streak.append(step)
            self._names |= dict.fromkeys(found)
        else:
            self.streak, self._names = [], {}
        return found

    def diverged(self, *, last: bool) -> bool:
        """Has the run diverged? ``last``: no step comes after."""
        return len(self.streak) >= (1 if last else self.settings.divergence_patience)

    def what(self) -> str:
        """What was not finite, and when: one phrase."""
        first, last = self.streak[0] + 1, self.streak[-1] + 1
        steps = f"step {last}" if first == last else f"steps {first} to {last}"
        return f"{', '.join(self._names)} of {steps} not finite"

    def tokens_after(self, steps: int) -> int:
        """Tokens that updates of the first ``steps`` steps have seen."""
        lost = sum(
            tokens_after(step + 1, self.stages) - tokens_after(step, self.stages)
            for step in self.skipped
            if step < steps
        )
        return tokens_after(steps, self.stages) - lost

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, so that resuming passes over the same steps and counts the same tokens."""
        return {"skipped": sorted(self.skipped), "rewinds": self.rewinds}

    def rewind(self, offending: Iterable[int]) -> None:
        """The run goes back; it will pass over the ``offending`` steps."""
        self.skipped |= {*offending}
        self.rewinds += 1
        self.streak, self._names = [], {}

    def may_rewind(self) -> bool:
        """Does the recipe want the run to go back once more?"""
        return self.settings.on_divergence == "rewind" and self.rewinds < self.settings.max_rewinds

    def error(self, what: str, good: Path | None) -> DivergedError:
        """How the run ends, in one line."""
        kept = "no checkpoint was saved before" if good is None else f"the last good checkpoint is {good}"
        remedy = "lower optimizer.lr or lengthen its warm-up in another run_dir"
        if self.settings.on_divergence == "stop":
            remedy += ", or set loss.on_divergence=rewind to go on there without the samples of these steps"
        elif self.rewinds >= self.settings.max_rewinds:
            remedy += f"; loss.max_rewinds={self.rewinds} are used up"
        return DivergedError(f"training diverged: {what}; {kept}; {remedy}")


def gradient_norm(optimizer: Any) -> float:
    """Norm of the gradients that a Megatron optimizer is about to use, before any clipping; collective.

    ``optimizer.step`` computes it too, but without a loss scaler it applies a gradient that is not finite, and with
    ``clip_grad`` 0 it computes none.
    """
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


class ExpertBiases:
    """The correction biases of Megatron's MoE routers, which move before it is known whether a step is any good."""

    def __init__(self, chunks: Iterable[nn.Module]) -> None:
        found = [getattr(module, "expert_bias", None) for chunk in chunks for module in chunk.modules()]
        self._biases: list[Tensor] = [bias for bias in found if isinstance(bias, Tensor)]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        self._kept = [bias.clone() for bias in self._biases]

    @torch.no_grad()
    def restore(self) -> None:
        for bias, kept in zip(self._biases, self._kept, strict=True):
            bias.copy_(kept)
