"""The main line: a recipe's stages on Megatron's DDP, optimizer and schedules."""

from __future__ import annotations

import importlib.metadata
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import runtime
from ..checkpoint import distributed, tracker
from ..checkpoint.manifest import Manifest
from ..checkpoint.resolve import budgets, elastic_space
from ..checkpoint.source import Source
from ..data import blend
from ..errors import UserError
from ..recipe import Recipe, dump
from ..router.table import router_line
from ..space import SubmodelSpec
from .build import Model, build_student, build_teacher
from .curriculum import Curriculum, LearningRate
from .datasets import check_files, check_tokens, dataset
from .evaluate import evaluate
from .family import parent_source
from .log import RunLog
from .signals import StopSignal
from .step import ForwardStep, MicroBatch

VERSIONED = ("torch", "megatron-core", "transformers", "elastic-megatron")


@dataclass(frozen=True)
class Outcome:
    """How a call of ``train`` ended: ``interrupted`` names the signal after which it saved and left.

    ``main`` is true on the one rank that talks to people.
    """

    checkpoint: Path
    step: int
    total_steps: int
    interrupted: signal.Signals | None
    main: bool


def train(recipe: Recipe) -> Outcome:
    """Run the recipe's stages, resuming from the newest checkpoint of its run folder.

    Raises ``UserError`` for recipes that cannot run here; every other failure is a defect.
    """
    if not recipe.stages:
        raise UserError("the recipe has no stages, so there is nothing to train; add stages:")
    if not recipe.data.train:
        raise UserError("the recipe has no data.train; add prefixes written by prepare-data")
    parallel = recipe.parallel
    if max(parallel.tensor, parallel.pipeline, parallel.context, parallel.expert) > 1:
        raise UserError("training runs with data parallelism only; set every size of parallel: to 1")
    check_files(recipe)
    place = runtime.start(seed=recipe.seed)
    source = parent_source(recipe)
    manifest, root = source.manifest, recipe.run_dir / "checkpoints"
    space = elastic_space(recipe, manifest) if recipe.budgets else None
    model = build_student(recipe, source, space)
    teacher = build_teacher(recipe, source)
    curriculum = Curriculum(recipe)
    saved = tracker.newest(root)
    state = distributed.load(saved, model.bare, optimizer=model.optimizer) if saved else {"step": 0}
    first = int(state["step"])
    manifest = replace(manifest, space=space, budgets=budgets(recipe), versions=versions())
    main = place.rank == 0
    if main:
        recipe.run_dir.mkdir(parents=True, exist_ok=True)
        (recipe.run_dir / "recipe.yaml").write_text(dump(recipe))
    with StopSignal() as stop, RunLog(
        recipe.run_dir, title=recipe.name, total=curriculum.total_steps, resumed_at=first,
        interval=recipe.log.interval, tensorboard=recipe.log.tensorboard, active=main,
    ) as log:  # fmt: skip
        run = _Run(recipe, curriculum, model, teacher, manifest, source, root, log, stop)
        return run.steps(first)


class _Run:
    """The loop: one optimiser step after another, with evaluation, checkpoints and logs at their intervals."""

    def __init__(self, recipe: Recipe, curriculum: Curriculum, model: Model, teacher: nn.Module | None,
                 manifest: Manifest, source: Source, root: Path, log: RunLog, stop: StopSignal) -> None:  # fmt: skip
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.recipe, self.curriculum, self.model, self.log, self.stop = recipe, curriculum, model, log, stop
        self.manifest, self.source, self.root = manifest, source, root
        self.forward_step = ForwardStep(recipe, model.router, teacher, curriculum.total_steps)
        self.forward_backward = get_forward_backward_func()
        self.groups = runtime.groups()
        self.datasets: dict[int, Any] = {}
        self.windows = _eval_windows(recipe)
        self.device = next(model.bare.parameters()).device

    def steps(self, first: int) -> Outcome:
        total, saved = self.curriculum.total_steps, first
        rates = LearningRate(self.model.optimizer, self.recipe.optimizer, self.curriculum)
        for step in range(first, total):
            stopping = self._one_step(step, rates.set(step))
            done = step + 1
            last = done == total or stopping
            if last or _due(done, self.recipe.checkpoint.interval):
                self._save(done)
                saved = done
            if done == total or _due(done, self.recipe.log.eval_interval):
                self._report(done)
            if stopping and done < total:
                received = self.stop.received or signal.SIGTERM
                self.log.say(f"{received.name}: saved step {done}; run the same command to continue")
                return Outcome(self.root, done, total, received, self.log.active)
        if saved == 0:
            raise UserError("the recipe's stages have no steps; raise stages[].tokens")
        return Outcome(self.root, total, total, None, self.log.active)

    def _one_step(self, step: int, lr: float) -> bool:
        """One optimiser step; returns whether any rank was asked to stop, so that all stop together."""
        began = time.perf_counter()
        place, model = self.curriculum.place(step), self.model
        batches = list(self._microbatches(step))
        model.ddp.zero_grad_buffer()
        model.optimizer.zero_grad()
        outputs = self.forward_backward(
            forward_step_func=self.forward_step,
            data_iterator=iter(batches),
            model=model.ddp,
            num_microbatches=len(batches),
            seq_length=place.stage.seq_length,
            micro_batch_size=place.stage.micro_batch_size,
            decoder_seq_length=place.stage.seq_length,
            forward_only=False,
        )
        updated, grad_norm, _ = model.optimizer.step()
        sums = self._reduced(outputs)
        line = {
            "step": step + 1,
            "stage": place.stage.name,
            "tokens": self.curriculum.tokens_after(step + 1),
            "loss": sums["loss"],
            "kd_loss": sums.get("kd_loss"),
            "router_loss": sums.get("router_loss"),
            "budget": _budget_field([b.budget for b in batches if b.budget is not None]),
            "lr": lr,
            "grad_norm": float(grad_norm or 0.0),
            "step_ms": round(1e3 * (time.perf_counter() - began), 2),
        }
        if not updated or line["loss"] != line["loss"]:
            line["skipped"] = True
        self.log.step(line)
        return sums["stop"] > 0

    def _microbatches(self, step: int) -> Iterator[MicroBatch]:
        place, rank, world = self.curriculum.place(step), self.groups.dp.rank(), self.groups.dp.size()
        stage = place.stage
        if stage.global_batch_size % (stage.micro_batch_size * world):
            raise UserError(
                f"stages[{place.stage_index}]: global_batch_size {stage.global_batch_size} is not a multiple of "
                f"micro_batch_size {stage.micro_batch_size} x {world} data-parallel ranks"
            )
        samples, vocab_size = self._dataset(place.stage_index), self.manifest.shape.vocab_size
        for m in range(stage.global_batch_size // (stage.micro_batch_size * world)):
            batch = blend.batch(
                samples, place.samples, micro_batch_size=stage.micro_batch_size, dp_rank=rank, dp_size=world,
                microbatch=m,
            )  # fmt: skip
            check_tokens(batch["tokens"], vocab_size)
            budget = self.curriculum.draw_budget(place, m, rank) if self.model.router is not None else None
            yield MicroBatch(
                **{k: v.to(self.device) for k, v in batch.items()},
                step=step,
                budget=budget,
                key=(self.recipe.seed, "gumbel", step, m, rank),
            )

    def _dataset(self, index: int) -> Any:
        if index not in self.datasets:
            stage = self.recipe.stages[index]
            self.datasets = {
                index: dataset(
                    self.recipe,
                    self.recipe.data.train,
                    seq_length=stage.seq_length,
                    num_samples=stage.steps * stage.global_batch_size,
                    stage=index,
                )
            }
        return self.datasets[index]

    def _reduced(self, outputs: list[dict[str, Tensor]]) -> dict[str, float]:
        """Per-token means over the global batch, and ``stop``: did a rank receive a signal?"""
        asked = torch.tensor(float(self.stop.received is not None), dtype=torch.float64, device=self.device)
        rows = {n: sum(o[n].double() for o in outputs) for n in outputs[0]} | {"stop": asked}
        sums = torch.stack(list(rows.values()))  # type: ignore[arg-type]
        torch.distributed.all_reduce(sums, group=self.groups.dp_cp)
        values = dict(zip(rows, sums.tolist(), strict=True))
        return {n: v / values["tokens"] for n, v in values.items() if n != "tokens"}

    def submodels(self) -> dict[str, SubmodelSpec]:
        """What the router would choose now, per budget."""
        router = self.model.router
        if router is None:
            return {}
        return {b.name: router.choose(b) for b in self.manifest.budgets}

    def _report(self, done: int) -> None:
        """Evaluate every submodel, and log what the router chooses."""
        submodels = self.submodels()
        if self.model.router is not None:
            self.log.event(
                "router",
                router_line(self.model.router, submodels, done, **self.forward_step.temperatures(done - 1)),
            )
        if self.windows:
            results = evaluate(
                self.model.bare, self.model.space, submodels, self.windows, group=self.groups.dp_cp
            )
            tokens = self.curriculum.tokens_after(done)
            self.log.event("eval", {"step": done, "tokens": tokens, "submodels": results})
            shown = "  ".join(f"{n} {r['loss']:.4f}" for n, r in results.items())
            self.log.say(f"step {done}: nats per token: {shown}")

    def _save(self, done: int) -> None:
        distributed.save(
            self.root,
            done,
            self.model.bare,
            replace(self.manifest, submodels=self.submodels()),
            optimizer=self.model.optimizer,
            state={"step": done, "tokens": self.curriculum.tokens_after(done)},
            hf_files=self.source.hf_files,
            keep_last=self.recipe.checkpoint.keep_last,
        )


def _eval_windows(recipe: Recipe) -> list[Tensor]:
    """The first ``eval_tokens`` tokens of ``data.valid`` in windows of the first stage's length."""
    if not recipe.data.valid:
        return []
    length = recipe.stages[0].seq_length
    count = max(1, recipe.log.eval_tokens // length)
    valid = dataset(recipe, recipe.data.valid, seq_length=length, num_samples=count)
    return [torch.as_tensor(valid[i]["tokens"]) for i in range(min(count, len(valid)))]


def versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def _budget_field(drawn: list[str]) -> str | dict[str, int] | None:
    counts = Counter(drawn)
    return None if not counts else next(iter(counts)) if len(counts) == 1 else dict(counts)


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
