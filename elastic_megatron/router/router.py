"""The budget router: budget in, probabilities over the choices of every axis out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..ops.gumbel import Key, gumbel_noise, gumbel_softmax
from ..ops.mix import SubmodelMix
from ..space import Budget, ElasticSpace, SubmodelSpec


class BudgetRouter(nn.Module):
    """One small MLP per axis: one-hot budget -> Linear -> LeakyReLU -> Linear -> logits of the choices.

    As in Nemotron Elastic (arXiv 2511.16664): bias-free, slope 0.1, inner width 256; an axis of
    ``space.per_layer`` has logits for each of its layers. The full budget is the parent by definition and,
    with ``pin_full``, is not sampled: no other submodel costs as much.

    Args:
        space: axes and choices.
        budgets: the training budgets; their relative targets order the one-hot input.
        targets: each budget's target relative to the parent's cost, for ordering and interpolation.
    """

    def __init__(
        self,
        space: ElasticSpace,
        budgets: Sequence[Budget],
        targets: Sequence[float],
        *,
        inner_size: int = 256,
        init_std: float = 0.1,
        pin_full: bool = True,
        seed: int = 1234,
    ) -> None:
        super().__init__()
        order = sorted(range(len(budgets)), key=lambda i: -targets[i])
        self.space = space
        self.budgets = tuple(budgets[i] for i in order)
        self.targets = tuple(targets[i] for i in order)
        self.pin_full = pin_full
        generator = torch.Generator().manual_seed(seed)
        self.heads = nn.ModuleDict()
        for axis in space.axes:
            rows = len(space.layers(axis)) if axis in space.per_layer else 1
            outputs = rows * len(space.choices_of(axis))
            head = nn.Sequential(
                nn.Linear(len(budgets), inner_size, bias=False, device="cpu", dtype=torch.float32),
                nn.LeakyReLU(0.1),
                nn.Linear(inner_size, outputs, bias=False, device="cpu", dtype=torch.float32),
            )
            for p in head.parameters():
                nn.init.normal_(p, std=init_std, generator=generator)
            self.heads[axis] = head

    def encode(self, budget: Budget | str | float) -> Tensor:
        """Input vector [budgets]: one-hot of a training budget, or two neighbours blended by the target.

        A number is a relative target; between training targets it interpolates linearly, beyond them it
        takes the nearest.
        """
        like = next(self.parameters())
        code = torch.zeros(len(self.budgets), device=like.device, dtype=like.dtype)
        if not isinstance(budget, int | float):
            name = budget if isinstance(budget, str) else budget.name
            code[[b.name for b in self.budgets].index(name)] = 1
            return code
        for i, (high, low) in enumerate(zip(self.targets, self.targets[1:], strict=False)):
            if high >= budget >= low:
                share = (budget - low) / (high - low) if high > low else 1.0
                code[i], code[i + 1] = share, 1 - share
                return code
        code[0 if budget > self.targets[0] else -1] = 1
        return code

    def logits(self, budget: Budget | str | float) -> dict[str, Tensor]:
        """Raw logits: [choices], or [layers, choices] for per-layer axes."""
        code = self.encode(budget)
        out = {}
        for axis, head in self.heads.items():
            flat = head(code)
            choices = len(self.space.choices_of(axis))
            out[axis] = flat.view(-1, choices) if axis in self.space.per_layer else flat
        return out

    def _pinned(self, budget: Budget | str | float) -> bool:
        name = getattr(budget, "name", budget)
        return self.pin_full and any(b.full and b.name == name for b in self.budgets)

    def forward(
        self, budget: Budget | str | float, *, key: Key, tau: float, logit_scale: float, hard: bool
    ) -> SubmodelMix:
        """Sample a mix. ``key`` determines the noise, independently for every axis and layer."""
        return self.sample(self.logits(budget), budget, key=key, tau=tau, logit_scale=logit_scale, hard=hard)

    def sample(
        self, logits: Mapping[str, Tensor], budget: Budget | str | float, *, key: Key, tau: float,
        logit_scale: float, hard: bool,
    ) -> SubmodelMix:  # fmt: skip
        """As ``forward``, from the raw logits of the budget."""
        if self._pinned(budget):
            return self.parent_mix()
        probs = {}
        for axis, raw in logits.items():
            scaled = raw.float() * logit_scale
            probs[axis] = gumbel_softmax(scaled, gumbel_noise((*key, axis), scaled), tau, hard)
        return SubmodelMix(self.space, probs, hard=hard)

    def parent_mix(self) -> SubmodelMix:
        """The full model, exactly."""
        return SubmodelMix.one_hot(self.space, self.space.full(), next(self.parameters()).device)

    @torch.no_grad()
    def choose(self, budget: Budget | str | float) -> SubmodelSpec:
        """The deterministic choice: the argmax of the raw logits."""
        if self._pinned(budget):
            return self.space.full()
        return SubmodelMix(self.space, self.logits(budget)).argmax()

    @torch.no_grad()
    def probabilities(self, budget: Budget | str | float, logit_scale: float = 1.0) -> SubmodelMix:
        """Noise-free probabilities, for logs and plots."""
        if self._pinned(budget):
            return self.parent_mix()
        logits = self.logits(budget)
        return SubmodelMix(
            self.space, {a: torch.softmax(v.float() * logit_scale, -1) for a, v in logits.items()}
        )
