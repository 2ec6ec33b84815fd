"""What the router chooses and how well every submodel does, while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..checkpoint.manifest import Manifest
from ..recipe import Recipe
from ..router.table import router_line
from ..space import SubmodelSpec
from .batches import eval_batch_size, eval_windows
from .build import Model
from .evaluate import evaluate
from .log import RunLog
from .quantizers import Rounding


class Assessment:
    """Evaluates the family of a run on held-out text.

    Args:
        frozen: without a router, the widths of each budget.
        rounding: of a quantised model.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Model,
        manifest: Manifest,
        frozen: Mapping[str, SubmodelSpec],
        rounding: Rounding | None,
    ) -> None:
        self.model, self.manifest, self.frozen, self.rounding = model, manifest, frozen, rounding
        self.windows, self.batch_size = eval_windows(recipe), eval_batch_size(recipe)

    def submodels(self) -> Mapping[str, SubmodelSpec]:
        """What the router would choose now, per budget; the widths that are frozen."""
        router = self.model.router
        if router is None:
            return self.frozen
        return {b.name: router.choose(b) for b in self.manifest.budgets}

    def missed(self, log: RunLog, done: int) -> bool:
        """Was a run killed after it had saved this step, and before it had assessed it? Collective."""
        kind = "eval" if self.windows else "router"
        told = [log.lacks(kind, done) and (bool(self.windows) or self.model.router is not None)]
        torch.distributed.broadcast_object_list(told)
        return told[0]

    def report(self, log: RunLog, done: int, tokens: int, temperatures: Mapping[str, float]) -> None:
        """Evaluate every submodel after ``done`` steps, and log what the router chooses; collective."""
        submodels, router = self.submodels(), self.model.router
        # of logits that are not finite nothing is the most probable
        finite = router is not None and all(bool(p.isfinite().all()) for p in router.parameters())
        if router is not None and finite and log.lacks("router", done):
            log.event("router", router_line(router, submodels, done, **temperatures))
        if not self.windows:
            return
        taught = self.rounding is not None or self.frozen
        results = evaluate(
            [pair if taught else pair.alone() for pair in self.model.pairs],
            self.model.space,
            submodels,
            self.windows,
            batch_size=self.batch_size,
        )
        line = {"step": done, "tokens": tokens, "submodels": results}
        if self.rounding is not None:
            line["weights"] = self.rounding.quantised.format.name
        log.event("eval", line)
        shown = "  ".join(f"{n} {r['loss']:.4f}" for n, r in results.items())
        log.say(f"step {done}: nats per token: {shown}")
