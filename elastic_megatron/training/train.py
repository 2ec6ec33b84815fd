"""The main line: a recipe's stages on Megatron's DDP, optimizer and schedules."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import runtime
from ..checkpoint import distributed, tracker
from ..checkpoint.manifest import Manifest
from ..checkpoint.resolve import budgets, elastic_space
from ..checkpoint.source import Source
from ..errors import UserError
from ..ops.mix import SubmodelMix
from ..recipe import Recipe
from ..router.table import router_line
from ..space import ElasticSpace, SubmodelSpec
from .batches import Batches, eval_batch_size, eval_windows
from .build import Model, build_student, build_teacher, open_teacher_cache
from .curriculum import Curriculum, LearningRate
from .datasets import check_files
from .evaluate import evaluate
from .family import family_of, parent_source
from .held_folder import HeldFolder, held_folder
from .log import RunLog
from .quantize import quantizable, quantize_into, rounding_of
from .quantizers import Rounding
from .signals import StopSignal
from .start import start
from .step import ForwardStep
from .teacher_cache import TeacherCache
from .versions import versions

LOGGED = ("tokens", "loss", "kd_loss", "router_loss")


@dataclass(frozen=True)
class Outcome:
    """How a call of ``train`` ended: ``interrupted`` names the signal after which it saved and left.

    ``step`` of ``total_steps``, after which the recipe's job is complete. ``main`` is true on the one rank that
    talks to people.
    """

    checkpoint: Path
    step: int
    total_steps: int
    interrupted: signal.Signals | None
    main: bool


def train(recipe: Recipe) -> Outcome:
    """Run the recipe's stages up to ``last_step``, resuming from the newest checkpoint of its run folder.

    Where that is complete already, the checkpoint is loaded and nothing else done. A recipe that quantises begins with
    ``quantize``, if that was not done. Raises ``UserError`` for recipes that cannot run here; every other failure is a
    defect.
    """
    _check(recipe)
    check_files(recipe)
    source = parent_source(recipe)
    space, widths = elastic_space(recipe, source.manifest) if recipe.budgets else None, None
    if recipe.router_frozen:
        space, widths = source.manifest.space, family_of(recipe, source.manifest).values()
    main = start(recipe, source.manifest.shape, space, widths).rank == 0
    # from here on ranks wait for each other, so that they must leave together
    with held_folder(recipe.run_dir, "train") as folder:
        if recipe.quantize is not None and tracker.newest(recipe.run_dir / "checkpoints") is None:
            quantize_into(folder, recipe, quantizable(recipe))
            start(recipe, source.manifest.shape, space, widths)
        with StopSignal() as stop:
            return _train(recipe, source, space, folder, stop, main)


def _check(recipe: Recipe) -> None:
    if not recipe.stages:
        raise UserError("the recipe has no stages, so there is nothing to train; add stages:")
    if not recipe.data.train:
        raise UserError("the recipe has no data.train; add prefixes written by prepare-data")


def _train(
    recipe: Recipe,
    source: Source,
    space: ElasticSpace | None,
    folder: HeldFolder,
    stop: StopSignal,
    main: bool,
) -> Outcome:
    """Build, load and run, on ranks that have been joined."""
    saved = tracker.newest(recipe.run_dir / "checkpoints")
    rounding = rounding_of(recipe, saved) if recipe.quantize is not None and saved is not None else None
    cache = open_teacher_cache(recipe, source)
    model = build_student(recipe, source, space, build_teacher(recipe, source), rounding)
    # what `quantize` saved are the weights that the student has, and no optimizer
    resumed = saved is not None and not (rounding is not None and tracker.iteration(saved) == 0)
    state = distributed.load(saved, model.chunks, optimizer=model.optimizer) if resumed else {"step": 0}
    first, curriculum = int(state["step"]), Curriculum(recipe)
    manifest = replace(
        source.manifest,
        space=space if recipe.budgets else source.manifest.space,
        budgets=budgets(recipe),
        versions=versions(),
        quantised=rounding.quantised if rounding is not None else None,
    )
    folder.describe(recipe)
    checkpoint = recipe.checkpoint
    with RunLog(
        recipe.run_dir, title=recipe.name, total=recipe.last_step, resumed_at=first,
        interval=recipe.log.interval, tensorboard=recipe.log.tensorboard, active=main,
    ) as log, distributed.Saver(
        recipe.run_dir / "checkpoints", keep_last=checkpoint.keep_last, async_save=checkpoint.async_save,
        check=folder.check,
    ) as saver:  # fmt: skip
        run = _Run(recipe, curriculum, model, manifest, source, folder, saver, log, stop, rounding, cache)
        return run.steps(first)


class _Run:
    """The loop: one optimiser step after another, with evaluation, checkpoints and logs at their intervals."""

    def __init__(self, recipe: Recipe, curriculum: Curriculum, model: Model, manifest: Manifest,
                 source: Source, folder: HeldFolder, saver: distributed.Saver, log: RunLog, stop: StopSignal,
                 rounding: Rounding | None, cache: TeacherCache | None) -> None:  # fmt: skip
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.recipe, self.curriculum, self.model, self.log, self.stop = recipe, curriculum, model, log, stop
        self.manifest, self.source, self.folder, self.saver = manifest, source, folder, saver
        self.rounding = rounding
        self.forward_backward = get_forward_backward_func()
        self.groups = runtime.groups()
        self.device = next(model.chunks[0].parameters()).device
        self.frozen = family_of(recipe, manifest) if recipe.router_frozen else {}
        # the whole model is a mix too, so that ranks that draw different budgets count tokens alike
        mixes = {
            name: SubmodelMix.one_hot(model.space, spec, self.device)
            for name, spec in self.frozen.items()
            if model.space is not None
        }
        self.forward_step = ForwardStep(recipe, model.router, curriculum.total_steps, mixes, model.submodels)
        self.batches = Batches(curriculum, manifest.shape.vocab_size, self.device, cache)
        self.windows = eval_windows(recipe)
        for chunk in model.ddp:
            chunk.config.finalize_model_grads_func = self._finalize

    def steps(self, first: int) -> Outcome:
        total, checkpoint, stages = self.recipe.last_step, self.recipe.checkpoint, self.recipe.stages
        rates = LearningRate(self.model.optimizer, self.recipe.optimizer, self.curriculum)
        if asked := self._asked_to_stop():
            return self._interrupted(asked, first, "stopped before the first step")
        self.batches.check_known(first, total)
        for step in range(first, total):
            if self.folder.lost:
                self.stop.ask(signal.SIGTERM)  # all ranks go to save, where they are told together
            asked = self._one_step(step, rates.set(step))
            self.saver.poll()
            done = step + 1
            saves = done == total or asked or checkpoint.due(done, stages)
            if saves or _due(done, self.recipe.log.eval_interval):
                with self.model.gathered():
                    if saves:
                        self._save(done)
                    if done == total or _due(done, self.recipe.log.eval_interval):
                        self._report(done)
            if asked and done < total:
                return self._interrupted(asked, done, f"saved step {done}")
        return Outcome(self.saver.directory, total, total, None, self.log.active)

    def _asked_to_stop(self) -> signal.Signals | None:
        """The signal that some rank received, the same on all, so that they leave together."""
        flags = torch.tensor(self.stop.flags(), device=self.device)
        torch.distributed.all_reduce(flags)
        return self.stop.agreed(flags.tolist())

    def _interrupted(self, asked: signal.Signals, done: int, what: str) -> Outcome:
        self.log.say(f"{asked.name}: {what}; run the same command to continue")
        return Outcome(self.saver.directory, done, self.recipe.last_step, asked, self.log.active)

    def _one_step(self, step: int, lr: float) -> signal.Signals | None:
        """One optimiser step; returns the signal that some rank received meanwhile, the same on all."""
        began = time.perf_counter()
        place, model = self.curriculum.place(step), self.model
        batches = self.batches.of_step(step)
        for chunk in model.ddp:
            chunk.zero_grad_buffer()
        model.optimizer.zero_grad()
        self.forward_step.begin()
        several = len(model.ddp) > 1
        outputs = self.forward_backward(
            forward_step_func=self.forward_step,
            data_iterator=[iter(batches) for _ in model.ddp] if several else iter(batches),
            model=model.ddp if several else model.ddp[0],
            num_microbatches=len(batches),
            seq_length=place.stage.seq_length,
            micro_batch_size=place.stage.micro_batch_size,
            decoder_seq_length=place.stage.seq_length,
            forward_only=False,
        )
        updated, grad_norm, _ = model.optimizer.step()
        sums, asked = self._reduced(outputs)
        line = {
            "step": step + 1,
            "stage": place.stage.name,
            "tokens": self.curriculum.tokens_after(step + 1),
            "loss": sums["loss"],
            "kd_loss": sums["kd_loss"] if self.recipe.loss.kind != "cross_entropy" else None,
            "router_loss": sums["router_loss"] if model.router is not None else None,
            "budget": self.batches.budgets(place) if self.recipe.budgets else None,
            "lr": lr,
            "grad_norm": float(grad_norm or 0.0),
            "step_ms": round(1e3 * (time.perf_counter() - began), 2),
        }
        if not updated or line["loss"] != line["loss"]:
            line["skipped"] = True
        self.log.step(line)
        return asked

    def _finalize(self, *args: Any, **kwargs: Any) -> None:
        """Megatron's reduction of gradients, with the router's among them."""
        from megatron.core.distributed import finalize_model_grads

        self.forward_step.finish()
        finalize_model_grads(*args, **kwargs)

    def _reduced(self, outputs: list[dict[str, Tensor]]) -> tuple[dict[str, float], signal.Signals | None]:
        """Per-token means over the global batch, and the signal that some rank received.

        Only the last pipeline stage has outputs, and its tensor ranks have the same ones.
        """
        counted, flags = outputs if self.groups.tp.rank() == 0 else [], self.stop.flags()
        sums = torch.zeros(len(LOGGED) + len(flags), dtype=torch.float64, device=self.device)
        for i, name in enumerate(LOGGED):
            for output in counted:
                sums[i] += output.get(name, 0.0)
        sums[len(LOGGED) :] = torch.tensor(flags)
        torch.distributed.all_reduce(sums)
        tokens, *means = sums.tolist()[: len(LOGGED)]
        asked = self.stop.agreed(sums.tolist()[len(LOGGED) :])
        return {n: v / tokens for n, v in zip(LOGGED[1:], means, strict=True)}, asked

    def submodels(self) -> dict[str, SubmodelSpec]:
        """What the router would choose now, per budget; the widths that are frozen."""
        router = self.model.router
        if router is None:
            return self.frozen
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
            quantised = self.rounding is not None
            taught = quantised or self.frozen
            results = evaluate(
                [pair if taught else pair.alone() for pair in self.model.pairs],
                self.model.space,
                submodels,
                self.windows,
                batch_size=eval_batch_size(self.recipe),
            )
            line = {"step": done, "tokens": self.curriculum.tokens_after(done), "submodels": results}
            if quantised:
                line["weights"] = self.rounding.quantised.format.name
            self.log.event("eval", line)
            shown = "  ".join(f"{n} {r['loss']:.4f}" for n, r in results.items())
            self.log.say(f"step {done}: nats per token: {shown}")

    def _save(self, done: int) -> None:
        self.saver.save(
            done,
            self.model.chunks,
            replace(self.manifest, submodels=self.submodels()),
            optimizer=self.model.optimizer,
            state={"step": done, "tokens": self.curriculum.tokens_after(done)},
            hf_files=self.source.hf_files,
            amax=self.rounding.amax if self.rounding is not None else None,
        )


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
