"""The calibration pass of a recipe: score, sort into lanes, prove that the function is unchanged, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..blocks import build_chunks, build_model, forward_only
from ..checkpoint import distributed
from ..checkpoint.agreement import check_finite, same_on_all_ranks
from ..checkpoint.resolve import elastic_space
from ..checkpoint.sort import sort_model, sort_space
from ..checkpoint.source import Source
from ..errors import UserError
from ..importance import Ranking, collect
from ..importance.depth import squared_error
from ..recipe import Recipe
from ..space import ElasticSpace
from .calibration import CalibrationData, shown
from .checks import check_rank
from .datasets import dataset
from .experts import expert_execution
from .family import DTYPES, parent_source
from .held_folder import HeldFolder, held_folder
from .start import start_whole_stages
from .versions import versions

# relative change of the logits that reordered sums may cause, by data type
ROUNDING = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True)
class Ranked:
    """What ``rank`` wrote, and how much the logits moved (relative; rounding of reordered sums).

    ``main`` is true on the one rank that talks to people.
    """

    checkpoint: Path
    ranking: Ranking
    logits_error: float
    main: bool


def rank(recipe: Recipe) -> Ranked:
    """Rank and sort the recipe's parent, on all ranks of the world together.

    Writes ``ranking.safetensors``, ``ranking.json`` and a sorted checkpoint into the run folder. The ranking does
    not depend on ``recipe.parallel``. Raises ``UserError`` for a recipe without choices or data, for samples that
    do not divide among the data-parallel ranks, and where the sorted model computes something else than the parent.
    """
    check_rank(recipe)
    source = parent_source(recipe)
    if source.manifest.ranking is not None:
        raise UserError(f"{source.path} is sorted already; rank the parent it was made from")
    space = elastic_space(recipe, source.manifest)
    assert space is not None
    main = start_whole_stages(recipe, space.parent, space).rank == 0
    with held_folder(recipe.run_dir, "rank") as folder:
        return _rank(recipe, source, space, folder, main)


def _rank(recipe: Recipe, source: Source, space: ElasticSpace, folder: HeldFolder, main: bool) -> Ranked:
    """Build, score, sort and save, on ranks that have been joined."""
    settings = recipe.rank
    samples = dataset(recipe, recipe.data.train, seq_length=settings.seq_length, num_samples=settings.samples)
    how = {"dtype": DTYPES[recipe.model.dtype], **expert_execution(recipe)}
    chunks = build_chunks(lambda vp_stage: build_model(space.parent, vp_stage=vp_stage, **how).eval())
    source.fill(chunks)
    check_finite(chunks, what=str(source.path))
    ranking, error = sort_by_importance(recipe, chunks, space, samples, show=main)
    with same_on_all_ranks(f"{recipe.run_dir} cannot be written"):
        if main:
            folder.check()
            ranking.save(recipe.run_dir)
    folder.describe(recipe)
    manifest = replace(
        source.manifest, space=sort_space(space, ranking), ranking=ranking.digest(), versions=versions()
    )
    root = recipe.run_dir / "checkpoints"
    distributed.save(root, 0, chunks, manifest, hf_files=source.hf_files, check=folder.check)
    return Ranked(root, ranking, error, main)


def sort_by_importance(
    recipe: Recipe, chunks: Sequence[Any], space: ElasticSpace, samples: Any, *, show: bool
) -> tuple[Ranking, float]:
    """Score the components of a filled model and sort it in place; collective, under any layout.

    Args:
        recipe: its ``rank`` and ``model.dtype`` count.
        chunks: this rank's pipeline chunks, bare, of shape ``space.parent``.
        samples: ``samples[i]["tokens"]`` [sequence] int64 of the whole data set, on every rank.
        show: whether this rank shows progress.

    Returns the ranking, and by how much the logits moved: relative, from rounding of reordered sums.

    Raises ``UserError`` where samples do not divide among data-parallel ranks, or the sorted model computes
    something else.
    """
    device = next(chunks[0].parameters()).device
    batches = CalibrationData("rank", recipe.rank, samples, space.parent.vocab_size, device)
    dims = space.choices_of("mamba_head_dim") if "mamba_head_dim" in space.axes else None
    ranking = collect(
        chunks,
        space.parent,
        shown(batches, "ranking", show=show),
        axes=space.axes,
        head_dim_kept=dims[-1] if dims else None,
    )
    probe = next(iter(batches))
    before = _logits(chunks, probe)
    sort_model(chunks, space, ranking)
    error = _change(before, _logits(chunks, probe), device)
    if not error <= ROUNDING[recipe.model.dtype]:
        raise UserError(
            f"sorting changed the logits by {error:.1e}, more than rounding; the parent's checkpoint is damaged or "
            "this is a defect"
        )
    return ranking, error


def _logits(chunks: Sequence[Any], batch: dict[str, Tensor]) -> list[Tensor]:
    """This rank's part of a batch's logits, on the last pipeline stage."""
    return forward_only(chunks, [batch], lambda _, logits: logits)


def _change(before: Sequence[Tensor], after: Sequence[Tensor], device: torch.device) -> float:
    """Relative distance of logits whose parts lie on all ranks; the same on each."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for old, new in zip(before, after, strict=True):
        total += squared_error(old, new)
    torch.distributed.all_reduce(total)
    return float((total[0] / total[1]).sqrt())
