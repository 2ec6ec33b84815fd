"""``elastic-megatron plan RECIPE|CHAIN|HF_DIR``: what a family costs, whether its layout fits, what its jobs take."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .overrides import add_overrides

if TYPE_CHECKING:
    from ..checkpoint.hf_quantised import Quantised
    from ..checkpoint.manifest import Manifest
    from ..cost.rank_memory import Load
    from ..cost.setting import Setting
    from ..preflight.family import Families
    from ..recipe import JobChain, PlannedJob
    from ..space import Budget, ElasticSpace, ParentShape, SubmodelSpec

CONTEXTS = (8192, 49152, 262144)
_DESCRIPTION = """Parameters, FLOPs, weights per format and caches of a model and its submodels, whether the
parallel layout fits, an estimate of the memory per rank, and for each job its tokens, GPU-hours and disk. Needs no
weights, no GPU and no torch.

RECIPE and CHAIN are YAML files. HF_DIR is a directory with a config.json (or that file); where it has an
elastic_config.json too, its submodels are listed. A recipe's submodels are the router's to choose, so before
training the smallest and the full one are shown instead. Of a chain the last job that trains a family is shown.

Of a quantised HF_DIR, and of a recipe with a section `quantize`, the size of the files is shown too, which depends on
what stays as it is: with --json, `stored_format`, `left_alone` (layers by kind) and, of each size, `stored_bytes`;
`unread` says why it could not be told.

With --json, `jobs` holds per job: job, ranks, steps, tokens, flops, gpu_hours and hours (fewest and most; null
unless the cluster file names a GPU), slurm_jobs (how often the time limit is reached at most), memory_per_rank,
memory_limit (bytes of the GPU), checkpoint_bytes (one), disk_bytes (all that are there at a time) and problems of
its layout. `serving` has a line for each expert width that engines cannot serve in NVFP4 on --serving-tensor ranks,
where that is asked or it is quantised so."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="sizes, memory, layout and GPU-hours of a recipe, chain or model, without its weights",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=Path, metavar="RECIPE|CHAIN|HF_DIR", help="YAML file or model directory"
    )
    add_overrides(parser, "the files'")
    parser.add_argument(
        "--context", type=int, default=8192, metavar="N", help="tokens of a sequence for FLOPs and caches"
    )
    parser.add_argument(
        "--serving-tensor",
        type=int,
        metavar="N",
        help="tensor ranks of the engine that will serve the models: tell expert widths that it cannot take in NVFP4",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """The plan as a dict with ``--json``, else as tables. A layout with problems is a finding, not an error.

    Raises ``UserError`` for a broken recipe, config or ``--context``.
    """
    if args.context < 1:
        raise UserError(f"--context {args.context} must be at least 1 token")
    if args.serving_tensor is not None and args.serving_tensor < 1:
        raise UserError(f"--serving-tensor {args.serving_tensor} must be at least 1 rank")
    from .plan_layout import serving

    subject = read(args.source, args.overrides, args.context)
    result = plan(subject) | {"serving": serving(subject, args.serving_tensor)}
    if args.json:
        return result
    from .plan_tables import show

    show(subject, result)
    return None


@dataclass(frozen=True)
class Subject:
    """What is planned: a model, its family, and the jobs that it is to run in.

    ``load`` is the most that a rank computes at a time, and ``load_name`` what that is; ``jobs`` has a chain of one job
    for a recipe, ``None`` for a model directory. ``quantised`` is how the weights of such a directory are stored, or
    will be by a recipe; ``unread`` why that cannot be read.
    """

    name: str
    manifest: Manifest
    space: ElasticSpace | None
    budgets: tuple[Budget, ...]
    setting: Setting
    load: Load
    load_name: str
    context: int
    jobs: tuple[JobChain, Families] | None = None
    quantised: Quantised | None = None
    unread: str | None = None

    @property
    def trained(self) -> bool:
        """Are the submodels chosen, so that their widths are known?"""
        known = bool(self.manifest.submodels) and all(
            spec.widths for spec in self.manifest.submodels.values()
        )
        return self.space is not None and self.space == self.manifest.space and known

    @property
    def submodels(self) -> Mapping[str, SubmodelSpec]:
        """The chosen submodels, or the two ends of the range they are to be chosen from."""
        if self.space is None:
            return {}
        if self.trained:
            return self.manifest.submodels
        return {"full": self.space.full(), "smallest": self.space.smallest()}

    @property
    def contexts(self) -> tuple[int, ...]:
        """Lengths of the sequences whose caches are shown."""
        return tuple(sorted({self.context, *CONTEXTS}))


def read(source: Path, overrides: Sequence[str], context: int) -> Subject:
    """A recipe or chain, or a Hugging Face directory or ``config.json``. Raises ``UserError`` for a bad one."""
    from ..checkpoint.hf_quantised import read_quantised
    from ..checkpoint.resolve import CONFIG, hf_manifest
    from ..cost.rank_memory import Load
    from ..cost.setting import LayoutSizes, Setting
    from ..files.json_files import read_object

    if source.name != CONFIG and not source.is_dir():
        from .plan_jobs import chain_of

        return _of_chain(chain_of(source, overrides), context)
    if overrides:
        raise UserError(
            f"{overrides[0]!r}: overrides belong to recipes, and {source} is a model; leave them out"
        )
    manifest = hf_manifest(source)
    folder = source.parent if source.name == CONFIG else source
    setting = Setting(manifest.shape, manifest.space, LayoutSizes(1, False, 1, None, 1, None, 1, None))
    forward = Load(context, 1, training=False)
    quantised, unread = None, None
    try:
        quantised = read_quantised(
            folder, read_object(folder / CONFIG, "give a Hugging Face model directory")
        )
    except UserError as e:
        unread = str(e)  # sizes need no format
    return Subject(
        folder.resolve().name,
        manifest,
        manifest.space,
        manifest.budgets,
        setting,
        forward,
        "forward pass",
        context,
        quantised=quantised,
        unread=unread,
    )


def _of_chain(chain: JobChain, context: int) -> Subject:
    from ..checkpoint.resolve import budgets, elastic_space
    from ..preflight.family import Families
    from .plan_jobs import fullest_load, setting_of

    families, job = Families(chain), _main(chain)
    parent = families.of(job).parent
    stored = [families.of(each).result.quantised for each in chain.jobs if each.recipe.job != "export"]
    load_name, load = fullest_load(chain, job, families.of(job))
    return Subject(
        job.recipe.name if len(chain.jobs) == 1 else chain.name,
        parent,
        elastic_space(job.recipe, parent) if job.recipe.job != "export" else parent.space,
        budgets(job.recipe) or parent.budgets,
        setting_of(chain, job, families.of(job)),
        load,
        load_name,
        context,
        (chain, families),
        next((each for each in reversed(stored) if each is not None), parent.quantised),
    )


def _main(chain: JobChain) -> PlannedJob:
    """The last job that trains a family, else that trains at all, else the last."""
    training = [job for job in chain.jobs if job.recipe.job == "train"]
    elastic = [job for job in training if job.recipe.budgets]
    return (elastic or training or list(chain.jobs))[-1]


def plan(subject: Subject) -> dict[str, Any]:
    """The object that ``--json`` prints: parameters, FLOPs of one token, bytes; seconds for latency."""
    from .plan_layout import layout_of

    shape, space = subject.manifest.shape, subject.space
    parent = _cost(subject, shape)
    submodels: dict[str, dict[str, Any]] = {
        name: _cost(subject, space, spec) | {"widths": spec.to_dict()}
        for name, spec in subject.submodels.items()
        if space is not None
    }
    separate = {f: sum(s["weights_bytes"][f] for s in submodels.values()) for f in parent["weights_bytes"]}
    layout = layout_of(subject)
    out = {
        "parent": parent,
        "submodels": submodels,
        "budgets": {b.name: _budget(subject, b) for b in subject.budgets},
        "family_bytes": {**parent["weights_bytes"], "separate": separate},
        "layout": layout,
        "memory_per_rank": _memory(subject) if layout["layers_per_stage"] else None,
        "jobs": {},
    }
    if subject.quantised is not None:
        from ..checkpoint.quantised_layers import left_alone

        out["stored_format"] = subject.quantised.format.name
        out["left_alone"] = left_alone(subject.quantised, shape)
        out["family_bytes"]["stored"] = parent["stored_bytes"]
        separate["stored"] = sum(s["stored_bytes"] for s in submodels.values())
    if subject.unread is not None:
        out["unread"] = subject.unread
    if subject.jobs is not None:
        from .plan_jobs import jobs_of

        out["jobs"] = jobs_of(*subject.jobs)
    return out


def _cost(
    subject: Subject, of: ElasticSpace | ParentShape, spec: SubmodelSpec | None = None
) -> dict[str, Any]:
    """``account``, with the caches of several lengths: tokens (as text) -> bytes of one sequence."""
    from ..cost import account, sizes_of_parent, sizes_of_spec
    from ..cost.memory import cache_bytes
    from ..space import ElasticSpace

    model = sizes_of_spec(of, spec or of.full()) if isinstance(of, ElasticSpace) else sizes_of_parent(of)
    caches = {str(tokens): cache_bytes(model, tokens) for tokens in subject.contexts}
    out = account(of, spec, subject.context).to_dict() | {"cache_bytes": caches}
    if subject.quantised is not None:
        from ..checkpoint.hf_quantised import stored_bytes

        space = of if isinstance(of, ElasticSpace) else ElasticSpace(of, ())
        out["stored_bytes"] = stored_bytes(subject.quantised, space, spec or space.full())
    return out


def _memory(subject: Subject) -> dict[str, int]:
    from ..cost.rank_memory import memory_per_rank

    return memory_per_rank(subject.manifest.shape, subject.setting.parallel, subject.load)


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
