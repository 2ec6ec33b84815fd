"""Post-training quantisation: calibrate through every submodel, freeze the magnitudes, save, judge."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from torch import nn

from ..blocks import build_chunks, forward_only
from ..blocks.forward import Batch
from ..checkpoint import distributed, tracker
from ..checkpoint.agreement import check_finite
from ..checkpoint.amax import Amax, amax_of
from ..checkpoint.hf_quantised import Quantised
from ..checkpoint.manifest import FILE, Manifest
from ..checkpoint.quantised_plan import planned_by
from ..checkpoint.resolve import budgets
from ..checkpoint.source import Source
from ..errors import UserError
from ..ops.mix import SubmodelMix
from ..recipe import Recipe
from ..space import ElasticSpace, SubmodelSpec
from .batches import eval_batch_size, eval_windows
from .build import bare_model, build_teacher, linears
from .calibration import CalibrationData, shown
from .checks import check_quantize
from .datasets import dataset
from .distill import DistilledChunk
from .evaluate import evaluate, one_size
from .experts import moe_overrides
from .family import family_of, parent_source
from .held_folder import HeldFolder, held_folder
from .leaves import leaves, sliced_models
from .log import RunLog
from .quantizers import QuantisedLinears, Rounding
from .start import start_whole_stages
from .versions import versions


@dataclass(frozen=True)
class Calibrated:
    """What ``quantize`` left in the run folder.

    ``unseen`` are experts that calibration never reached, by layer; ``None`` where it was done before. ``main`` is true
    on the one rank that talks to people.
    """

    checkpoint: Path
    unseen: Mapping[str, Sequence[int]] | None
    main: bool


@dataclass(frozen=True)
class Quantizable:
    """The model that a recipe quantises, with the submodels that calibration goes through, and how it is stored."""

    source: Source
    family: Mapping[str, SubmodelSpec]
    quantised: Quantised
    main: bool


def quantize(recipe: Recipe) -> Calibrated:
    """Quantise the recipe's model, on all ranks of the world together, and save it as step 0 of the run.

    The weights are saved as they are, beside the largest magnitudes under which they are rounded. The losses of every
    submodel before and after go to ``metrics.jsonl``. The result does not depend on ``recipe.parallel``, but for the
    order of sums.

    Where that was done before, nothing is. Raises ``UserError`` for recipes that cannot run here, and where the run
    folder holds another model.
    """
    found = quantizable(recipe)
    with held_folder(recipe.run_dir, "quantize") as folder:
        return quantize_into(folder, recipe, found)


def quantizable(recipe: Recipe) -> Quantizable:
    """What a recipe quantises, on all ranks, which are joined. Raises ``UserError`` as ``quantize``."""
    check_quantize(recipe)
    source = parent_source(recipe)
    manifest = source.manifest
    if source.inputs is not None:
        raise UserError(f"{source.path} is quantised already; name the checkpoint that it was made from")
    family, quantised = family_of(recipe, manifest), quantised_as(recipe, manifest)
    main = start_whole_stages(recipe, manifest.shape, manifest.space, family.values()).rank == 0
    return Quantizable(source, family, quantised, main)


def quantize_into(folder: HeldFolder, recipe: Recipe, found: Quantizable) -> Calibrated:
    """As ``quantize``, in a run folder that is held."""
    root = recipe.run_dir / "checkpoints"
    if (saved := tracker.newest(root)) is not None:
        rounding_of(recipe, saved)
        return Calibrated(root, None, found.main)
    folder.describe(recipe)
    return _quantize(folder, recipe, found)


def quantised_as(recipe: Recipe, manifest: Manifest) -> Quantised:
    """How the recipe stores a model. Raises ``UserError`` as ``planned_by``."""
    assert recipe.quantize is not None
    return planned_by(recipe.quantize, manifest.shape, importlib.metadata.version("nvidia-modelopt"))


def rounding_of(recipe: Recipe, folder: Path) -> Rounding:
    """How the run's checkpoint is rounded. Raises ``UserError`` where the recipe now says something else."""
    manifest = Manifest.read(folder / FILE)
    found, wanted = manifest.quantised, quantised_as(recipe, manifest)
    if found is None:
        raise UserError(f"{folder} is a checkpoint of a run that did not quantise; choose another run_dir")
    if (found.format, found.patterns) != (wanted.format, wanted.patterns):
        raise UserError(
            f"{folder} was quantised by another section quantize than the recipe has; choose another run_dir, or the "
            f"section of {recipe.run_dir / 'recipe.yaml'}"
        )
    return Rounding(found, amax_of(folder, manifest))


def _quantize(folder: HeldFolder, recipe: Recipe, given: Quantizable) -> Calibrated:
    """Build, calibrate, judge and save, on ranks that have been joined."""
    source, family, quantised, main = given.source, given.family, given.quantised, given.main
    manifest, settings, root = source.manifest, recipe.quantize, recipe.run_dir / "checkpoints"
    assert settings is not None
    space = manifest.space
    overrides = moe_overrides(recipe, source)
    spec = leaves(recipe, manifest.shape, space, quantised, frozen=True)
    chunks = build_chunks(
        lambda vp_stage: bare_model(
            recipe, manifest.shape, space, spec=spec, vp_stage=vp_stage, **overrides
        ).eval()
    )
    source.fill(chunks)
    check_finite(chunks, what=str(source.path))
    found = linears(chunks, recipe, manifest.shape, quantised)
    teacher = build_teacher(recipe, source)

    def pairs(teacher: Sequence[nn.Module]) -> list[DistilledChunk]:
        submodels = sliced_models(recipe, chunks, spec) if space is not None else None
        return [DistilledChunk(*each) for each in zip_longest(chunks, teacher, submodels or ())]

    judge = _Judge(recipe, pairs(teacher), space, family)
    with RunLog(
        recipe.run_dir, title=recipe.name, total=recipe.last_step, resumed_at=-1, interval=recipe.log.interval,
        tensorboard=recipe.log.tensorboard, active=main,
    ) as log:  # fmt: skip
        judge.tell(log, recipe.model.dtype)
        samples = dataset(
            recipe, recipe.data.train, seq_length=settings.seq_length, num_samples=settings.samples
        )
        device = next(chunks[0].parameters()).device
        batches = CalibrationData("quantize", settings, samples, manifest.shape.vocab_size, device)
        amax, unseen = _calibrate(pairs(()), space, family, found, shown(batches, "calibrating", show=main))
        tokens = settings.samples * settings.seq_length
        log.event("calibration", {"step": 0, "tokens": tokens, "unseen": unseen})
        found.freeze(amax)
        judge.tell(log, settings.format)
    left = replace(
        manifest, budgets=budgets(recipe) or manifest.budgets, quantised=quantised, versions=versions()
    )
    distributed.save(
        root, 0, chunks, left, state={"step": 0, "tokens": 0}, hf_files=source.hf_files, amax=amax,
        check=folder.check,
    )  # fmt: skip
    return Calibrated(root, unseen, main)


def _calibrate(
    pairs: Sequence[DistilledChunk],
    space: ElasticSpace | None,
    family: Mapping[str, SubmodelSpec],
    found: QuantisedLinears,
    batches: Iterable[Batch],
) -> tuple[dict[str, Amax], dict[str, list[int]]]:
    """Every batch through the whole model and every submodel, so that the magnitudes hold for all of them."""
    device = next(pairs[0].parameters()).device
    specs = (
        dict.fromkeys(spec for spec in family.values() if spec != space.full()) if space is not None else ()
    )
    mixes = [(SubmodelMix.one_hot(space, spec, device), space.kept_layers(spec)) for spec in specs if space]
    found.collect()  # before submodels are cut out, whose linears are observed too
    for batch in batches:
        found.observe()
        forward_only(pairs, [batch], lambda _, __: None)
        for mix, layers in mixes:
            found.observe(layers)
            with ExitStack() as stack:
                for pair in pairs:
                    stack.enter_context(one_size(pair, mix))
                forward_only(pairs, [batch], lambda _, __: None)
    return found.calibrate()


class _Judge:
    """Losses of every submodel on held-out text, beside the frozen teacher."""

    def __init__(
        self,
        recipe: Recipe,
        pairs: Sequence[DistilledChunk],
        space: ElasticSpace | None,
        family: Mapping[str, SubmodelSpec],
    ) -> None:
        self.pairs, self.space, self.family = pairs, space, family
        self.windows, self.batch_size = eval_windows(recipe), eval_batch_size(recipe)

    def tell(self, log: RunLog, weights: str) -> None:
        """A line of the run's metrics, where there is held-out text."""
        if self.windows:
            results = evaluate(self.pairs, self.space, self.family, self.windows, batch_size=self.batch_size)
            log.event("eval", {"step": 0, "tokens": 0, "weights": weights, "submodels": results})
