"""``elastic-megatron plan RECIPE|HF_DIR``: what a family costs and whether its layout fits."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:
    from ..checkpoint.manifest import Manifest
    from ..recipe import Recipe
    from ..recipe.training import Parallel, Stage
    from ..space import Budget, ElasticSpace, SubmodelSpec

_DESCRIPTION = """Parameters, FLOPs, weights per format and caches of a model and its submodels, whether the
parallel layout fits, and an estimate of the memory per rank. Needs no weights, no GPU and no torch.

RECIPE is a YAML file. HF_DIR is a directory with a config.json (or that file); where it has an
elastic_config.json too, its submodels are listed. A recipe's submodels are the router's to choose, so before
training the smallest and the full one are shown instead."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="sizes, memory and layout of a recipe or model, without its weights",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="RECIPE|HF_DIR", help="YAML file or model directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the recipe's")
    parser.add_argument(
        "--context", type=int, default=8192, metavar="N", help="tokens of a sequence for FLOPs and caches"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """The plan as a dict with ``--json``, else as tables. A layout with problems is a finding, not an error.

    Raises ``UserError`` for a broken recipe, config or ``--context``.
    """
    if args.context < 1:
        raise UserError(f"--context {args.context} must be at least 1 token")
    subject = read(args.source, args.overrides, args.context)
    result = plan(subject)
    if args.json:
        return result
    from .plan_tables import show

    show(subject, result)
    return None


@dataclass(frozen=True)
class Load:
    """What one rank computes at a time: a stage's micro-batch in training, otherwise a forward pass."""

    name: str
    seq_length: int
    micro_batch_size: int
    training: bool
    teacher: bool


@dataclass(frozen=True)
class Subject:
    """What is planned: a model, its family, and how it is to run."""

    name: str
    manifest: Manifest
    space: ElasticSpace | None
    budgets: tuple[Budget, ...]
    parallel: Parallel
    stages: tuple[Stage, ...]
    load: Load
    dtype: str
    context: int

    @property
    def trained(self) -> bool:
        """Are the submodels chosen, so that their widths are known?"""
        return self.space is not None and self.space == self.manifest.space and bool(self.manifest.submodels)

    @property
    def submodels(self) -> Mapping[str, SubmodelSpec]:
        """The chosen submodels, or the two ends of the range they are to be chosen from."""
        if self.space is None:
            return {}
        if self.trained:
            return self.manifest.submodels
        return {"full": self.space.full(), "smallest": self.space.smallest()}


def read(source: Path, overrides: Sequence[str], context: int) -> Subject:
    """A recipe, or a Hugging Face directory or ``config.json``. Raises ``UserError`` for a bad one."""
    from ..checkpoint.resolve import CONFIG, hf_manifest
    from ..recipe import load
    from ..recipe.training import Parallel

    if source.name != CONFIG and not source.is_dir():
        return _of_recipe(load(source, overrides), context)
    if overrides:
        raise UserError(
            f"{overrides[0]!r}: overrides belong to recipes, and {source} is a model; leave them out"
        )
    manifest = hf_manifest(source)
    folder = source.parent if source.name == CONFIG else source
    forward = Load("forward pass", context, 1, training=False, teacher=False)
    return Subject(
        folder.resolve().name,
        manifest,
        manifest.space,
        manifest.budgets,
        Parallel(),
        (),
        forward,
        "bf16",
        context,
    )


def _of_recipe(recipe: Recipe, context: int) -> Subject:
    from ..checkpoint.resolve import budgets, elastic_space, parent_manifest

    manifest = parent_manifest(recipe)
    if recipe.stages:
        stage = max(recipe.stages, key=lambda s: s.seq_length * s.micro_batch_size)
        teacher = recipe.loss.kind != "cross_entropy"
        load = Load(f"stage {stage.name}", stage.seq_length, stage.micro_batch_size, True, teacher)
    else:
        load = Load("rank", recipe.rank.seq_length, recipe.rank.micro_batch_size, False, False)
    return Subject(
        recipe.name,
        manifest,
        elastic_space(recipe, manifest),
        budgets(recipe) or manifest.budgets,
        recipe.parallel,
        recipe.stages,
        load,
        recipe.model.dtype,
        context,
    )


def plan(subject: Subject) -> dict[str, Any]:
    """The object that ``--json`` prints: parameters, FLOPs of one token, bytes; seconds for latency."""
    from ..cost import account

    shape, space = subject.manifest.shape, subject.space
    parent = account(shape, context_length=subject.context).to_dict()
    submodels: dict[str, dict[str, Any]] = {
        name: account(space, spec, subject.context).to_dict() | {"widths": spec.to_dict()}
        for name, spec in subject.submodels.items()
        if space is not None
    }
    separate = {f: sum(s["weights_bytes"][f] for s in submodels.values()) for f in parent["weights_bytes"]}
    layout = _layout(subject)
    return {
        "parent": parent,
        "submodels": submodels,
        "budgets": {b.name: _budget(subject, b) for b in subject.budgets},
        "family_bytes": {**parent["weights_bytes"], "separate": separate},
        "layout": layout,
        "memory_per_rank": _memory(subject) if layout["layers_per_stage"] else None,
    }


def _layout(subject: Subject) -> dict[str, Any]:
    """Problems of the layout; group -> ranks, of dense and of expert parameters (``data`` is null where the world
    is unknown); layers of each pipeline stage, chunk by chunk, empty where there are too few."""
    from ..cost.layout import check_layout, check_sequence
    from ..cost.parallel import rank_grids
    from ..space import stage_layers

    shape, parallel = subject.manifest.shape, subject.parallel
    problems = check_layout(shape, subject.space, parallel, subject.stages)
    if not subject.stages:
        problems += check_sequence(parallel, subject.load.name, subject.load.seq_length)
    dense, experts = rank_grids(parallel)
    parts = parallel.pipeline * (parallel.virtual_pipeline or 1)
    sizes = [len(part) for part in stage_layers(shape.num_layers, parts)] if parts <= shape.num_layers else []
    return {
        "ok": not problems,
        "problems": problems,
        "dense": dense,
        "expert": experts if shape.layers_of("E") else {},
        "layers_per_stage": [
            sizes[stage :: parallel.pipeline] for stage in range(parallel.pipeline) if sizes
        ],
    }


def _memory(subject: Subject) -> dict[str, int]:
    from ..cost.layout import memory_per_rank

    load, parallel = subject.load, subject.parallel
    return memory_per_rank(
        subject.manifest.shape,
        parallel,
        dtype=subject.dtype,
        training=load.training,
        seq_length=load.seq_length,
        micro_batch_size=load.micro_batch_size,
        teacher=load.teacher,
        recompute=parallel.recompute == "full",
        distributed_optimizer=parallel.distributed_optimizer,
    )


def _budget(subject: Subject, budget: Budget) -> dict[str, Any]:
    """A target in its own unit, beside what the family's two ends cost by the same metric."""
    from ..cost import metric, sizes_of_parent, sizes_of_spec

    whole = float(metric(sizes_of_parent(subject.manifest.shape), budget))
    space = subject.space
    least = whole if space is None else float(metric(sizes_of_spec(space, space.smallest()), budget))
    absolute = budget.target * (whole if budget.unit == "ratio" else 1)
    return {
        "metric": budget.metric,
        "target": budget.target,
        "unit": budget.unit,
        "absolute": absolute,
        "smallest": least,
        "full": whole,
        "reachable": least <= absolute <= whole,
    }
