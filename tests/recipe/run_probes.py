"""What a training run, a ranking or an export is built from, observed where it is built.

Each probe takes a recipe and returns something to compare: what the code hands to Megatron, draws, computes or writes.
Probes that take over a function do so through `patched`.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from elastic_megatron import conversion, runtime
from elastic_megatron.blocks import build_model, model
from elastic_megatron.checkpoint import distributed, manifest, tracker
from elastic_megatron.checkpoint import source as checkpoint_source
from elastic_megatron.checkpoint.resolve import budgets, elastic_space, parent_manifest
from elastic_megatron.commands import export_recipe
from elastic_megatron.commands import train as train_command
from elastic_megatron.errors import UserError
from elastic_megatron.ops import chunked_kd
from elastic_megatron.ops.mix import SubmodelMix
from elastic_megatron.recipe import Recipe
from elastic_megatron.router.loss import budget_loss
from elastic_megatron.training import (
    batches,
    build,
    checks,
    curriculum,
    datasets,
    family,
    quantize,
    rank,
    start,
    step,
    teacher_cache,
    train,
)
from elastic_megatron.training.divergence import DivergenceWatch
from elastic_megatron.training.spikes import Spikes


class Stop(Exception):
    """Ends the code under observation, with what was seen."""

    def __init__(self, seen: object) -> None:
        self.seen = seen


def stop(*args: Any, **kwargs: Any) -> None:
    raise Stop((args, kwargs))


@contextlib.contextmanager
def patched(**replaced: tuple[Any, Any]) -> Iterator[None]:
    """`name=(module, value)` for the time of the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, (module, value) in replaced.items():
            patch.setattr(module, name, value)
        yield


def plain(value: Any) -> Any:
    """Only what compares by its value."""
    simple = (int, float, str, bool, type(None), torch.dtype, Path)
    return {key: item for key, item in value.items() if isinstance(item, simple)}


def source_of(recipe: Recipe) -> Any:
    manifest, path = parent_manifest(recipe), Path("source")
    return SimpleNamespace(manifest=manifest, fill=lambda chunks: None, path=path, inputs=None, hf_files=None)


def space_of(recipe: Recipe) -> Any:
    """The elastic space, or the complaint about its widths."""
    try:
        return elastic_space(recipe, parent_manifest(recipe))
    except UserError as error:
        return str(error)


def layout(recipe: Recipe) -> Any:
    """Sizes and seed that the runtime is started with, on eight ranks; or why not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "8")
        patch.setattr(start.runtime, "start", lambda **sizes: sizes)
        try:
            return start.start(recipe, parent_manifest(recipe).shape, None)
        except UserError as error:
            return str(error)


def model_config(recipe: Recipe) -> Any:
    """What `HybridModel` is built with."""
    with patched(HybridModel=(model, stop)), pytest.raises(Stop) as caught:
        build.build_student(recipe, source_of(recipe), None)
    (config, *_), options = caught.value.seen  # type: ignore[misc]
    return plain(vars(config)), plain(options)


def model_config_with_kernels(recipe: Recipe) -> Any:
    """The same where fused kernels are installed."""
    with patched(fused_experts=(runtime, lambda: {"use_fused_weighted_squared_relu": True})):
        return model_config(recipe)


def mixer(recipe: Recipe) -> Any:
    """Mamba's mixer of the model itself."""
    [module] = [m for m in build_model(parent_manifest(recipe).shape).modules() if hasattr(m, "d_conv")]
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters() if "conv" in name}
    return shapes, module.chunk_size


def optimizer(recipe: Recipe) -> Any:
    """Settings and parameter groups that Megatron's optimizer gets."""
    import megatron.core.optimizer as module

    with patched(get_megatron_optimizer=(module, stop)), pytest.raises(Stop) as caught:
        build._optimizer(recipe, [], family.DTYPES[recipe.model.dtype])
    (settings, _), options = caught.value.seen  # type: ignore[misc]
    return plain(vars(settings)), list(options["config_overrides"].values())


def communication(recipe: Recipe) -> Any:
    """Settings of Megatron's DDP."""
    import megatron.core.distributed as module

    pair = SimpleNamespace(config=SimpleNamespace())
    with patched(DistributedDataParallel=(module, stop)), pytest.raises(Stop) as caught:
        build._distributed(recipe, [pair])
    return asdict(caught.value.seen[0][1])  # type: ignore[index]


def learning_rates(recipe: Recipe) -> Any:
    """Rates and weight decay of a model's group and the router's, at every step."""
    settings = recipe.optimizer
    group = {"max_lr": settings.lr, "min_lr": settings.min_lr, "wd_mult": 1.0, "lr_mult": 1.0}
    groups = [
        {**group, "default_config": True},
        {**group, "max_lr": recipe.router.lr, "default_config": False},
    ]
    rates = curriculum.LearningRate(
        SimpleNamespace(param_groups=groups), settings, curriculum.Curriculum(recipe)
    )
    seen = []
    for number in range(recipe.last_step):
        rates.set(number)
        seen += [(g["lr"], g["weight_decay"]) for g in groups]
    return seen


class Tokens:
    """A data set of as many samples as asked for."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def __len__(self) -> int:
        return self.settings["num_samples"]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= len(self):
            raise IndexError(index)
        row = torch.arange(self.settings["seq_length"]) + index
        return dict.fromkeys(("tokens", "labels", "position_ids", "loss_mask"), row % 7)


def data_sets(recipe: Recipe) -> Any:
    """What Megatron's data sets are asked for, by every stage and by evaluation."""
    asked = []

    def record(blend: Any, **settings: Any) -> Tokens:
        asked.append((blend, settings))
        return Tokens(**settings)

    with patched(build_dataset=(datasets.blend, record)):
        reader = batches.Batches(curriculum.Curriculum(recipe), 64, torch.device("cpu"))
        for index in range(len(recipe.stages)):
            reader._dataset(index)
        windows = batches.eval_windows(recipe)
    return asked, [window.tolist() for window in windows]


def micro_batches(recipe: Recipe) -> Any:
    """Shape, budget and key of the noise of every micro-batch, step by step."""
    seen = []
    with patched(build_dataset=(datasets.blend, lambda blend, **settings: Tokens(**settings))):
        reader = batches.Batches(curriculum.Curriculum(recipe), 64, torch.device("cpu"))
        for number in range(recipe.last_step):
            seen += [
                (tuple(b.tokens.shape), b.budget, b.key, b.weight, b.again, b.sliced)
                for b in reader.of_step(number)
            ]
    return seen


def stage_names(recipe: Recipe) -> Any:
    """The stage that every step's line of metrics names."""
    places = curriculum.Curriculum(recipe)
    return [places.place(number).stage.name for number in range(recipe.last_step)]


def losses(recipe: Recipe) -> Any:
    """What micro-batches of every budget cost at the first and the last step, over fixed logits; and their widths."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 8, 64, generator=generator)
    student, reference = (chunked_kd.Projection(one, torch.eye(64)) for one in logits)
    tokens = torch.arange(16).view(2, 8)
    seen: list[Any] = []

    @contextlib.contextmanager
    def running(mix: Any) -> Iterator[None]:
        seen.extend(p.tolist() for p in mix.probs.values())
        yield

    router = build.build_router(recipe, space_of(recipe))
    forward = step.ForwardStep(recipe, router, recipe.total_steps)
    with patched(running=(step, lambda model, mix: running(mix))):
        for number, budget in product((0, recipe.total_steps - 1), recipe.budgets):
            forward.begin()
            key = (recipe.seed, "gumbel", number, 0)
            batch = step.MicroBatch(tokens, tokens, torch.ones(2, 8), tokens, number, budget, key)
            out, loss = forward(iter([batch]), lambda *_: (student, reference))  # type: ignore[arg-type]
            seen.append({name: float(value) for name, value in loss(out)[2].items()})
    return seen


def logit_blocks(recipe: Recipe) -> Any:
    """How many tokens' logits are made at a time, by a forward and a backward pass over 16 tokens."""
    tokens, seen = torch.arange(16).view(2, 8), []

    class Block(chunked_kd.LogitBlock):
        def __init__(self, objective: Any, student: torch.Tensor, *others: Any) -> None:
            seen.append(len(student))
            super().__init__(objective, student, *others)

    student = chunked_kd.Projection(torch.zeros(2, 8, 4), torch.zeros(64, 4, requires_grad=True))
    forward = step.ForwardStep(recipe, None, recipe.total_steps)
    batch = step.MicroBatch(tokens, tokens, torch.ones(2, 8), tokens, 0, None, ())
    with patched(LogitBlock=(chunked_kd, Block)):
        out, loss = forward(iter([batch]), lambda *_: (student, student))  # type: ignore[arg-type]
        loss(out)[0].backward()
    return seen


def budget_errors(recipe: Recipe) -> Any:
    """How far a fixed mix of widths is from every budget."""
    space = space_of(recipe)
    mix = SubmodelMix.one_hot(space, space.smallest(), torch.device("cpu"))
    return [(b.name, [float(value) for value in budget_loss(mix, b)]) for b in budgets(recipe)]


def router_weights(recipe: Recipe) -> Any:
    state = build.build_router(recipe, space_of(recipe)).state_dict()
    return {name: value.tolist() for name, value in state.items()}


def opened(recipe: Recipe) -> Any:
    """The folders that parent and teacher are read from, and that of the tokenizer."""
    seen: list[Any] = []

    def record(path: Path) -> Any:
        seen.append(path)
        shape = SimpleNamespace(vocab_size=64 + (path.name == "teacher"))
        return family.Source(path, SimpleNamespace(shape=shape), stop, None)  # type: ignore[arg-type]

    with patched(open_source=(family, record)), pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "open_source", record)
        source = family.parent_source(recipe)
        seen.append(source.hf_files)
        with contextlib.suppress(UserError, Stop, AttributeError):
            build.build_teacher(recipe, source)
    return seen


def kept(recipe: Recipe) -> Any:
    """Where what the teacher says is kept, how much of it, and whether there is a teacher that could be asked."""
    seen: list[Any] = []
    manifest = SimpleNamespace(shape=SimpleNamespace(vocab_size=64))
    source = family.Source(Path("teacher"), manifest, stop, None)  # type: ignore[arg-type]
    with patched(
        teacher_source=(build, lambda *_: source),
        _claim=(teacher_cache, lambda folder, header: seen.append((folder, header))),
        digest=(teacher_cache, str),
    ):
        found = build.open_teacher_cache(recipe, source)
    return seen, found is not None and (found.records.folder, found.top_k, found.only)


def ranking(recipe: Recipe) -> Any:
    """What a calibration pass asks of its data, its micro-batches, and what is scored; or why it is refused."""
    asked: list[Any] = []

    def data(recipe: Recipe, sources: Any, **settings: Any) -> Tokens:
        asked.append(settings)
        return Tokens(**settings)

    def collect(chunks: Any, shape: Any, shown: Any, **settings: Any) -> None:
        raise Stop((asked, [tuple(b["tokens"].shape) for b in shown], sorted(settings["axes"])))

    with patched(
        check_resumed=(checks, lambda *_: None),  # the folder is that of the runs of other probes
        parent_source=(rank, lambda _: source_of(recipe)),
        start_whole_stages=(rank, lambda *_: SimpleNamespace(rank=0)),
        dataset=(rank, data),
        build_chunks=(rank, lambda _: [nn.Linear(1, 1)]),
        collect=(rank, collect),
    ):
        try:
            rank.rank(recipe)
        except UserError as error:
            return str(error)
        except Stop as seen:
            return seen.seen
    raise AssertionError("the pass did not reach its data")


class Linears:
    """Quantised linears that tell how they were asked for, once calibration is over."""

    def __init__(self, chunks: Any, shape: Any, quantised: Any, config: str) -> None:
        self.seen = [quantised.file, config]

    def collect(self) -> None:
        """Inputs follow."""

    def observe(self) -> None:
        """Those of all layers."""

    def calibrate(self) -> None:
        raise Stop(self.seen)


def quantising(recipe: Recipe) -> Any:
    """The linears that `quantize` asks for and ModelOpt's configuration; its data, and every micro-batch of it."""
    seen: list[Any] = []
    chunk = nn.Linear(1, 1)
    chunk.vocab_size = 64  # type: ignore[assignment]

    def data(recipe: Recipe, sources: Any, **settings: Any) -> Tokens:
        seen.append(settings)
        return Tokens(**settings)

    with patched(
        parent_source=(quantize, source_of),
        newest=(quantize.tracker, lambda _: None),
        check_quantize=(quantize, lambda _: None),
        start_whole_stages=(quantize, lambda *_: SimpleNamespace(rank=1)),
        held_folder=(quantize, lambda *_: contextlib.nullcontext(SimpleNamespace(describe=lambda _: None))),
        check_finite=(quantize, lambda *_, **__: None),
        build_chunks=(quantize, lambda _: [chunk]),
        build_teacher=(quantize, lambda *_: []),
        DistilledChunk=(quantize, lambda student, *_: student),
        QuantisedLinears=(build, Linears),
        dataset=(quantize, data),
        forward_only=(quantize, lambda chunks, batch, _: seen.extend(tuple(b["tokens"].shape) for b in batch)),
        evaluate=(quantize, lambda *_, **__: {}),
        RunLog=(quantize, lambda *_, **__: contextlib.nullcontext(SimpleNamespace(event=lambda *_: None))),
    ), pytest.raises(Stop) as caught:  # fmt: skip
        quantize.quantize(recipe)
    return caught.value.seen, seen  # type: ignore[misc]


def missed_budgets(recipe: Recipe) -> Any:
    """How training ends where every size is the whole model."""
    space = space_of(recipe)
    sizes = {budget.name: space.full() for budget in budgets(recipe)}
    found = SimpleNamespace(space=space, budgets=budgets(recipe), submodels=sizes)
    with patched(
        Manifest=(manifest, SimpleNamespace(read=lambda _: found)), resolve=(tracker, lambda path: path)
    ):
        try:
            train_command.check_budgets(recipe, Path("checkpoint"))
        except UserError as error:
            return [str(error)]
    return []


def trained_router(recipe: Recipe) -> Any:
    """Is there a router beside the student?"""
    with patched(
        build_chunks=(build, lambda _: [nn.Linear(1, 1)]),
        DistilledChunk=(build, lambda *_: None),
        _distributed=(build, lambda *_, **__: []),
        _optimizer=(build, lambda *_: None),
    ):
        return [build.build_student(recipe, source_of(recipe), space_of(recipe)).router is not None]


def exports(recipe: Recipe) -> Any:
    """The directories that an export writes, and how."""
    stored = SimpleNamespace(path=Path("checkpoint"))
    with patched(
        described=(export_recipe, lambda _: None), open_stored=(checkpoint_source, lambda path: stored),
        to_hf=(conversion, stop), digest=(export_recipe, lambda _: "0"),
    ), pytest.raises(Stop) as caught:  # fmt: skip
        export_recipe.export(recipe, max_shard_bytes=1)
    (_, requests), options = caught.value.seen  # type: ignore[misc]
    return [vars(request) for request in requests], options


def run(recipe: Recipe) -> Any:
    """A whole run of a few steps: the files it leaves, its metrics, what it says, and how checkpoints are written."""
    said, savers = io.StringIO(), []
    shutil.rmtree(recipe.run_dir, ignore_errors=True)

    class Saver(distributed.Saver):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            savers.append((args, plain(kwargs)))
            super().__init__(*args, **{**kwargs, "async_save": False})

    with patched(Saver=(distributed, Saver)), contextlib.redirect_stderr(said):
        outcome = train.train(recipe)
    folder = recipe.run_dir
    files = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_dir())
    text = (folder / "metrics.jsonl").read_text()
    return outcome, savers, files, _without_times(text), _without_times(said.getvalue())


def _without_times(text: str) -> str:
    return re.sub(r'"step_ms": [\d.]+|about \d+ s left', "", text)


def divergence(recipe: Recipe) -> object:
    """What follows of losses that are not finite, one after another, with a checkpoint to go back to."""
    watch, told = DivergenceWatch(recipe.loss, recipe.stages, {}), []
    for done in range(8):
        watch.judge(done, {"loss": math.nan})
        if watch.diverged(last=False):
            told.append((done, watch.may_rewind(), str(watch.error("loss", recipe.run_dir))))
            watch.rewind(watch.streak)
    return told


def spikes(recipe: Recipe) -> object:
    """Which of ever larger steps stand out of the noise before them."""
    seen = Spikes(recipe.loss)
    losses = [2 + 0.1 * math.sin(7 * n) + 1.05**n * (n % 5 == 4) for n in range(100)]
    return [seen.seen({"stage": "one", "loss": loss}) is not None for loss in losses]
