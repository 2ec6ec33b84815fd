"""What ``megatron.training.pretrain`` is given, so that it trains elastically."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.utils import unwrap_model
from megatron.training import get_tensorboard_writer, pretrain, print_rank_last, training
from megatron.training.argument_utils import hybrid_config_from_args, pretrain_cfg_container_from_args
from torch import Tensor, nn

from ... import runtime
from ...blocks import elastic_hybrid_stack_spec
from ...checkpoint import tracker
from ...checkpoint.agreement import same_on_all_ranks
from ...checkpoint.resolve import budgets, elastic_space
from ...checkpoint.sort import sort_space
from ...cost.layout import check_layout, check_sequence
from ...errors import UserError
from ...importance import Ranking
from ...space import SubmodelSpec
from ...training.batches import micro_batches
from ...training.build import build_router, build_teacher
from ...training.curriculum import Curriculum
from ...training.datasets import check_tokens
from ...training.evaluate import evaluate
from ...training.experts import moe_overrides
from ...training.rank import sort_by_importance
from ...training.step import ForwardStep, MicroBatch
from ...training.versions import versions
from ..shape import check_same, parent_shape
from .arguments import layout_of, recipe_of
from .data import Numbered, build_datasets
from .files import RunFolder, open_parent
from .model import CheckpointedChunk, FullPrecisionBuilder


class ElasticPretraining:
    """An elastic run of Megatron-LM.

    Args:
        args: what Megatron's parser made of its own arguments and ``add_arguments``.

    Raises ``UserError`` where arguments, recipe, parent and an interrupted run do not fit together.
    """

    def __init__(self, args: Namespace) -> None:
        self.args, self.recipe = args, recipe_of(args)
        self.curriculum = Curriculum(self.recipe)
        # losses are sums over tokens, normalised by the tokens of the global batch
        args.calculate_per_token_loss = True
        model = hybrid_config_from_args(args)
        shape = parent_shape(model)
        self.parent = open_parent(self.recipe, shape)
        if self.recipe.quantize is not None or self.recipe.router_frozen:
            raise UserError(
                f"{args.elastic_recipe} has quantize or router.frozen, which pretrain_elastic.py does not do; use "
                "elastic-megatron quantize and train"
            )
        if self.recipe.teacher.cache is not None:
            raise UserError(
                f"{args.elastic_recipe} has teacher.cache, which pretrain_elastic.py does not use; remove it, or use "
                "elastic-megatron train"
            )
        args.pretrained_checkpoint = None  # read here: Megatron would load it over the sorted weights
        self.resumed = args.load is not None and (Path(args.load) / tracker.TRACKER).exists()
        manifest = self.parent.manifest
        if self.resumed:
            manifest = RunFolder.read(Path(args.load), args.rank, args.world_size)
        check_same(
            shape, manifest.shape, "the arguments", str(args.load if self.resumed else self.parent.path)
        )
        space = elastic_space(self.recipe, manifest)
        if space is None:
            raise UserError(
                f"{args.elastic_recipe} has no space.choices, so nothing is elastic; name some axes"
            )
        problems = check_layout(manifest.shape, space, self.recipe.parallel, self.recipe.stages)
        if args.elastic_rank:
            problems += check_sequence(self.recipe.parallel, "rank", self.recipe.rank.seq_length)
            if "num_layers" in space.axes and not self.recipe.rank.depth:
                problems.append("num_layers is elastic but rank.depth is false; set rank.depth: true")
        if problems:
            raise UserError(problems[0])
        self.space = space
        self.manifest = replace(
            manifest, space=space, budgets=budgets(self.recipe), submodels={}, versions=versions()
        )
        writes = args.save is not None and args.rank == 0
        self.folder = RunFolder(Path(args.save), self.parent.hf_files) if writes else None
        self.windows: list[Tensor] = []
        for name, value in moe_overrides(self.recipe, self.parent).items():
            if name != "moe_token_dispatcher_type":
                setattr(args, name, value)
                setattr(model.transformer, name, value)
        model.hybrid_stack_spec = elastic_hybrid_stack_spec(
            space, model.hybrid_stack_spec or runtime.hybrid_stack_spec()
        )
        model.builder = f"{FullPrecisionBuilder.__module__}.{FullPrecisionBuilder.__qualname__}"
        model.pre_wrap_hooks.append(self._prepare)
        self.config = pretrain_cfg_container_from_args(args, model)

    def run(self) -> None:
        """Train, by Megatron's ``pretrain``.

        It builds the optimizer from ``get_megatron_optimizer_config`` and has no argument for parameter groups, so
        that function is replaced, as its own comment suggests.
        """
        training.get_megatron_optimizer_config = partial(
            self._optimizer_config, training.get_megatron_optimizer_config
        )
        try:
            self._pretrain()
        finally:
            if self.folder is not None:
                self.folder.close()

    def _pretrain(self) -> None:
        ended = None
        try:
            pretrain(
                self.config, self.datasets, ModelType.encoder_or_decoder, self.forward_step,
                non_loss_data_func=self.report,
            )  # fmt: skip
        except SystemExit as e:
            ended = e
        if self.folder is not None:
            self._choose(self.args.curr_iteration + 1)
            self.folder.describe()
        if ended is not None:
            raise ended

    def datasets(self, sizes: Sequence[int], vp_stage: int | None = None) -> tuple[Any, Any, Any]:
        """Megatron's ``train_valid_test_dataset_provider``."""
        train, valid, test = build_datasets(self.args, sizes, self.args.seq_length)
        scored = min(self.args.eval_iters * self.args.eval_global_batch_size, len(valid or ()))
        self.windows = [torch.as_tensor(valid[i]["tokens"]) for i in range(scored)]
        return tuple(None if d is None else Numbered(d) for d in (train, valid, test))  # type: ignore[return-value]

    datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank reads its own batches

    def forward_step(self, iterator: Iterator[Any], model: nn.Module) -> tuple[Any, Callable[[Any], Any]]:
        """Megatron's ``forward_step_func``; in evaluation it runs the whole parent-sized model."""
        step = self.args.curr_iteration
        if model.training and self.step.router_step is None:
            self._begin(step)
        batch = self._micro_batch(next(iterator), step if model.training else None)
        output, loss = self.step(iter([batch]), model)
        return output, partial(_logged, loss)

    def report(self, chunks: list[nn.Module]) -> None:
        """Megatron's ``non_loss_data_func``: the loss of every submodel on the validation samples."""
        students = [unwrap_model(chunk).module for chunk in chunks]
        size = self.recipe.stages[0].micro_batch_size
        losses = evaluate(students, self.space, self._submodels(), self.windows, batch_size=size)
        writer, iteration = get_tensorboard_writer(), self.args.curr_iteration + 1
        for name, result in losses.items():
            print_rank_last(
                f" submodel {name} | validation loss {result['loss']:.6E} | tokens {result['tokens']}"
            )
            if writer is not None:
                writer.add_scalar(f"submodel validation/{name}", result["loss"], iteration)

    def _prepare(self, chunks: list[nn.Module]) -> list[CheckpointedChunk]:
        """Between building and wrapping: parent, ranking, router and teacher."""
        place = runtime.adopt(layout_of(self.args))
        for chunk in chunks:
            runtime.one_optimizer_layout(chunk)
        ranking = None
        if not self.resumed:
            self.parent.fill(chunks)
            if self.args.elastic_rank and self.manifest.ranking is None:
                ranking = self._sort(chunks, show=place.rank == 0)
        with same_on_all_ranks(f"{self.args.save} cannot be written"):
            if self.folder is not None:
                self.folder.begin(self.manifest, self.recipe, ranking)
        self.router = build_router(self.recipe, self.space).to(place.device)
        chunks[0].budget_router = self.router
        self.step = ForwardStep(self.recipe, self.router, self.curriculum.total_steps)
        teacher = build_teacher(self.recipe, self.parent)
        pairs = [CheckpointedChunk(*pair) for pair in zip_longest(chunks, teacher)]
        for pair in pairs:
            pair.config.finalize_model_grads_func = self._finalize
        return pairs

    def _sort(self, chunks: list[nn.Module], *, show: bool) -> Ranking:
        settings = self.recipe.rank
        samples, _, _ = build_datasets(self.args, (settings.samples, 0, 0), settings.seq_length)
        ranking, _ = sort_by_importance(self.recipe, chunks, self.space, samples, show=show)
        self.space = sort_space(self.space, ranking)
        self.manifest = replace(self.manifest, space=self.space, ranking=ranking.digest())
        return ranking

    def _begin(self, step: int) -> None:
        stage = self.curriculum.place(step).stage
        given = {"seq_length": self.args.seq_length, "global_batch_size": get_current_global_batch_size()}
        for name, value in given.items():
            if getattr(stage, name) != value:
                raise UserError(
                    f"step {step} is in stage {stage.name!r} of the recipe, whose {name} is {getattr(stage, name)}, "
                    f"but --{name.replace('_', '-')} is {value}; give every stage a job of its own"
                )
        self.step.begin()
        # now the router's parameters are those of a checkpoint of this iteration, and complete
        if self.args.save_interval and step % self.args.save_interval == 0:
            self._choose(step)
        if self.folder is not None:
            self.folder.describe()

    def _micro_batch(self, batch: dict[str, Tensor], step: int | None) -> MicroBatch:
        """This rank's part of a batch of Megatron's loader; without a step nothing is drawn."""
        check_tokens(batch["tokens"], self.manifest.shape.vocab_size)
        device, first = next(self.router.parameters()).device, int(batch["sample"][0])
        place = None if step is None else self.curriculum.place(step)
        (only,) = micro_batches(
            batch, device, self.curriculum, place, first - self.args.consumed_train_samples
        )
        return only

    def _finalize(self, *args: Any, **kwargs: Any) -> None:
        """Megatron's reduction of gradients, with the router's among them."""
        self.step.finish()
        finalize_model_grads(*args, **kwargs)

    def _optimizer_config(self, stock: Callable[[Namespace], Any], args: Namespace) -> tuple[Any, Any]:
        """Megatron's parameter groups, the router in one of its own; and no group of two types.

        Megatron cannot save such a group, and ``A_log`` and ``D`` are fp32 in a bf16 model too. Neither has weight
        decay; saying so by its own bounds keeps the groups apart where Megatron finds them in a checkpoint.
        """
        config, overrides = stock(args)
        lr, no_decay = self.recipe.router.lr, {"start_wd": 0.0, "end_wd": 0.0}
        own = {
            ParamKey(name="*budget_router.*"): {
                "max_lr": lr,
                "min_lr": args.min_lr * lr / args.lr,
                **no_decay,
            },
            ParamKey(name=("*.mixer.A_log", "*.mixer.D")): no_decay,
        }
        return config, {**overrides, **own}

    def _submodels(self) -> dict[str, SubmodelSpec]:
        """What the router would choose now, per budget."""
        return {b.name: self.router.choose(b) for b in self.manifest.budgets}

    def _choose(self, iteration: int) -> None:
        if self.folder is not None:
            self.folder.choose(iteration, replace(self.manifest, submodels=self._submodels()))


def _logged(
    loss: Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]], output: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As Megatron reports: every sum with the number of tokens."""
    total, tokens, sums = loss(output)
    count = sums.pop("tokens")
    return total, tokens, {n.replace("_", " "): torch.stack([v, count]) for n, v in sums.items()}
