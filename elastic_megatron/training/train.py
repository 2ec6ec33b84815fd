"""The main line: a recipe's stages on Megatron's DDP, optimizer and schedules."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import distributed, tracker
from ..checkpoint.agreement import NonFiniteError
from ..checkpoint.manifest import Manifest
from ..checkpoint.resolve import budgets, elastic_space
from ..checkpoint.source import Source
from ..ops.mix import SubmodelMix
from ..recipe import Recipe
from ..space import ElasticSpace
from .assess import Assessment
from .batches import Batches
from .build import Model, build_student, build_teacher, open_teacher_cache
from .checks import check_train
from .curriculum import Curriculum, LearningRate
from .divergence import DivergenceWatch, ExpertBiases, gradient_norm
from .family import family_of, parent_source
from .held_folder import HeldFolder, held_folder
from .log import RunLog
from .quantize import quantizable, quantize_into, rounding_of
from .quantizers import Rounding
from .rewind import rewind
from .signals import StopSignal
from .spikes import Spikes
from .start import start
from .step import ForwardStep, reduced
from .teacher_cache import TeacherCache
from .versions import versions


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

    Where that is complete already, the checkpoint is loaded, and evaluated if that was not done. A recipe that
    quantises begins with ``quantize``, if that was not done. Raises ``UserError`` for recipes that cannot run here;
    every other failure is a defect.
    """
    check_train(recipe)
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
    state: dict[str, Any] = {"step": 0}
    if saved is not None and _resumable(saved, rounding):
        state = distributed.load(saved, model.chunks, optimizer=model.optimizer)
    first, curriculum = int(state["step"]), Curriculum(recipe)
    watch = DivergenceWatch(recipe.loss, recipe.stages, state)
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
        interval=recipe.log.interval, tensorboard=recipe.log.tensorboard, active=main, spikes=Spikes(recipe.loss),
    ) as log, distributed.Saver(
        recipe.run_dir / "checkpoints", keep_last=checkpoint.keep_last, async_save=checkpoint.async_save,
        check=folder.check,
    ) as saver:  # fmt: skip
        saver.published = saved
        run = _Run(
            recipe, curriculum, model, manifest, source, folder, saver, log, stop, rounding, cache, watch
        )
        return run.steps(first)


class _Run:
    """The loop: one optimiser step after another, with evaluation, checkpoints and logs at their intervals."""

    def __init__(self, recipe: Recipe, curriculum: Curriculum, model: Model, manifest: Manifest,
                 source: Source, folder: HeldFolder, saver: distributed.Saver, log: RunLog, stop: StopSignal,
                 rounding: Rounding | None, cache: TeacherCache | None,
                 watch: DivergenceWatch) -> None:  # fmt: skip
        from megatron.core.pipeline_parallel import get_forward_backward_func

        self.recipe, self.curriculum, self.model, self.log, self.stop = recipe, curriculum, model, log, stop
        self.manifest, self.source, self.folder, self.saver = manifest, source, folder, saver
        self.rounding, self.watch, self.biases = rounding, watch, ExpertBiases(model.chunks)
        self.forward_backward = get_forward_backward_func()
        self.device = next(model.chunks[0].parameters()).device
        frozen = family_of(recipe, manifest) if recipe.router_frozen else {}
        # the whole model is a mix too, so that ranks that draw different budgets count tokens alike
        mixes = {
            name: SubmodelMix.one_hot(model.space, spec, self.device)
            for name, spec in frozen.items()
            if model.space is not None
        }
        self.forward_step = ForwardStep(recipe, model.router, curriculum.total_steps, mixes, model.submodels)
        self.batches = Batches(curriculum, manifest.shape.vocab_size, self.device, cache)
        self.assessment = Assessment(recipe, model, manifest, frozen, rounding)
        for chunk in model.ddp:
            chunk.config.finalize_model_grads_func = self._finalize

    def steps(self, first: int) -> Outcome:
        total, checkpoint, stages = self.recipe.last_step, self.recipe.checkpoint, self.recipe.stages
        rates = LearningRate(self.model.optimizer, self.recipe.optimizer, self.curriculum)
        if asked := self._asked_to_stop():
            return self._interrupted(asked, first, "stopped before the first step")
        if first and self._evaluates(first) and self.assessment.missed(self.log, first):
            with self.model.gathered():
                self._assess(first)
        self.batches.check_known(first, total)
        done, owed = first, False
        while done < total:
            if self.folder.lost:
                self.stop.ask(signal.SIGTERM)  # all ranks go to save, where they are told together
            step = done
            passed, rate = step in self.watch.skipped, rates.set(step)
            asked = self._pass_over(step, rate) if passed else self._one_step(step, rate)
            self.saver.poll()
            done = step + 1
            trouble, saves = self.watch.what() if self.watch.diverged(last=done == total) else None, False
            if trouble is None:
                # a state right after a step without an update waits for one that had one
                owed = owed or done == total or bool(asked) or checkpoint.due(done, stages)
                saves = owed and not self.watch.streak
                owed = owed and not saves
                trouble = self._milestone(done, saves=saves)
            if trouble is not None:
                done = self._rewind(done, trouble)
                rates = LearningRate(self.model.optimizer, self.recipe.optimizer, self.curriculum)
                continue
            if asked and done < total:
                what = f"saved step {done}" if saves else f"step {done} had no update, so nothing was saved"
                return self._interrupted(asked, done, what)
        return Outcome(self.saver.directory, total, total, None, self.log.active)

    def _milestone(self, done: int, *, saves: bool) -> str | None:
        """Save and evaluate where that is due; says what is not finite of what would have been saved."""
        evaluates = self._evaluates(done)
        if saves or evaluates:
            with self.model.gathered():
                try:
                    if saves:
                        self._save(done)
                except NonFiniteError as error:
                    return error.what
                if evaluates:
                    self._assess(done)
        return None

    def _evaluates(self, done: int) -> bool:
        return done == self.recipe.last_step or _due(done, self.recipe.log.eval_interval)

    def _assess(self, done: int) -> None:
        temperatures = self.forward_step.temperatures(done - 1)
        self.assessment.report(self.log, done, self.watch.tokens_after(done), temperatures)

    def _rewind(self, done: int, what: str) -> int:
        """Go back, if the recipe says so, or end; returns the steps that are done then."""
        self.saver.finish()
        good = self.saver.published
        resumable = good is not None and _resumable(good, self.rounding)
        return rewind(self.model, self.saver, self.watch, self.log, done=done, what=what, resumable=resumable)

    def _pass_over(self, step: int, lr: float) -> signal.Signals | None:
        """A step whose samples are left out."""
        self.log.step(self._line(step, {}, lr) | {"updated": False, "skipped": True})
        return self._asked_to_stop()

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
        self.biases.keep()
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
        sums, flags = reduced(outputs, self.stop.flags(), self.device)
        values = sums | {"grad_norm": gradient_norm(model.optimizer)}
        broken = self.watch.judge(step, values)
        updated = not broken and bool(model.optimizer.step()[0])
        if not updated:
            self.biases.restore()
        line = self._line(step, values, lr) | {"updated": updated} | ({} if updated else {"skipped": True})
        line |= {"nonfinite": broken} if broken else {}
        self.log.step(line | {"step_ms": round(1e3 * (time.perf_counter() - began), 2)})
        return self.stop.agreed(flags)

    def _line(self, step: int, values: Mapping[str, float], lr: float) -> dict[str, Any]:
        """What is logged of a step; ``values`` are absent where it was not run."""
        place, distils = self.curriculum.place(step), self.recipe.loss.kind != "cross_entropy"
        return {
            "step": step + 1,
            "stage": place.stage.name,
            "tokens": self.watch.tokens_after(step + 1),
            "loss": values.get("loss"),
            "kd_loss": values.get("kd_loss") if distils else None,
            "router_loss": values.get("router_loss") if self.model.router is not None else None,
            "budget": self.batches.budgets(place) if self.recipe.budgets else None,
            "lr": lr,
            "grad_norm": values.get("grad_norm"),
        }

    def _finalize(self, *args: Any, **kwargs: Any) -> None:
        """Megatron's reduction of gradients, with the router's among them."""
        from megatron.core.distributed import finalize_model_grads

        self.forward_step.finish()
        finalize_model_grads(*args, **kwargs)

    def _save(self, done: int) -> None:
        self.saver.save(
            done,
            self.model.chunks,
            replace(self.manifest, submodels=self.assessment.submodels()),
            optimizer=self.model.optimizer,
            state={"step": done, "tokens": self.watch.tokens_after(done), **self.watch.state()},
            hf_files=self.source.hf_files,
            amax=self.rounding.amax if self.rounding is not None else None,
        )


def _resumable(saved: Path, rounding: Rounding | None) -> bool:
    """What ``quantize`` saved are the weights that the student has from its parent, and no optimizer."""
    return rounding is None or tracker.iteration(saved) > 0


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
