"""The calibration pass of a recipe: score, sort into lanes, prove that the function is unchanged, save."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from .. import runtime
from ..blocks import build_model
from ..checkpoint import distributed
from ..checkpoint.resolve import elastic_space
from ..checkpoint.slice import weights
from ..checkpoint.sort import sort_space, sorted_state
from ..errors import UserError
from ..importance import Ranking, collect
from ..recipe import Recipe, dump
from ..space import ElasticSpace
from .datasets import check_tokens, dataset
from .family import DTYPES, parent_source
from .train import versions

# relative change of the logits that reordered sums may cause, by data type
ROUNDING = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True)
class Ranked:
    """What ``rank`` wrote, and how much the logits moved (relative; rounding of reordered sums)."""

    checkpoint: Path
    ranking: Ranking
    logits_error: float


def rank(recipe: Recipe) -> Ranked:
    """Rank and sort the recipe's parent.

    Writes ``ranking.safetensors``, ``ranking.json``, ``plots/`` and a sorted checkpoint into the run folder.
    Raises ``UserError`` for a recipe without choices or data, and where the sorted model computes something
    else than the parent.
    """
    if not recipe.space.choices:
        raise UserError("the recipe has no space.choices, so there is nothing to rank; name the elastic axes")
    if not recipe.data.train:
        raise UserError("the recipe has no data.train to calibrate on; add prefixes written by prepare-data")
    runtime.start(seed=recipe.seed)
    source = parent_source(recipe)
    if source.manifest.ranking is not None:
        raise UserError(f"{source.path} is sorted already; rank the parent it was made from")
    space = elastic_space(recipe, source.manifest)
    assert space is not None
    model = build_model(space.parent, dtype=DTYPES[recipe.model.dtype]).eval()
    source.fill(model)
    ranking = _collect(recipe, model, space)
    ranking.save(recipe.run_dir)
    probe = next(_batches(recipe, model))
    before = _logits(model, probe)
    _sort(model, space, ranking)
    error = float((_logits(model, probe) - before).norm() / before.norm())
    if not error <= ROUNDING[recipe.model.dtype]:
        raise UserError(
            f"sorting changed the logits by {error:.1e}, more than rounding; the checkpoint {source.path} is "
            "damaged or this is a defect"
        )
    manifest = replace(
        source.manifest, space=sort_space(space, ranking), ranking=ranking.digest(), versions=versions()
    )
    (recipe.run_dir / "recipe.yaml").write_text(dump(recipe))
    root = recipe.run_dir / "checkpoints"
    distributed.save(root, 0, model, manifest, hf_files=source.hf_files)
    return Ranked(root, ranking, error)


def _collect(recipe: Recipe, model: nn.Module, space: ElasticSpace) -> Ranking:
    dims = space.choices_of("mamba_head_dim") if "mamba_head_dim" in space.axes else None
    axes = [a for a in space.axes if a != "num_layers" or recipe.rank.depth]
    if "num_layers" in space.axes and not recipe.rank.depth:
        raise UserError("num_layers is elastic but rank.depth is false; set rank.depth: true")
    total = -(-recipe.rank.samples // recipe.rank.micro_batch_size)
    console = Console(stderr=True)
    batches = track(
        _batches(recipe, model), "ranking", total=total, transient=True, console=console,
        disable=not console.is_terminal,
    )  # fmt: skip
    return collect(model, space.parent, batches, axes=axes, head_dim_kept=dims[-1] if dims else None)


def _batches(recipe: Recipe, model: nn.Module) -> Iterator[dict[str, Tensor]]:
    settings = recipe.rank
    samples = dataset(recipe, recipe.data.train, seq_length=settings.seq_length, num_samples=settings.samples)
    device = next(model.parameters()).device
    for start in range(0, settings.samples, settings.micro_batch_size):
        count = min(settings.micro_batch_size, settings.samples - start)
        tokens = torch.stack([samples[start + i]["tokens"] for i in range(count)])
        check_tokens(tokens, int(model.vocab_size))
        yield {"tokens": tokens.to(device)}


@torch.no_grad()
def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    tokens = batch["tokens"]
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens, positions, None).float()


def _sort(model: nn.Module, space: ElasticSpace, ranking: Ranking) -> None:
    state = weights(model.state_dict())
    missing = model.load_state_dict(dict(sorted_state(space, ranking, state.items())), strict=False)
    assert not missing.unexpected_keys, missing.unexpected_keys
