"""The student with its router and optimizer, and the frozen teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from .. import runtime
from ..blocks import SlicedModel, build_chunks, build_elastic_model, build_model
from ..checkpoint import tracker
from ..checkpoint.agreement import ROUTER, check_finite
from ..checkpoint.hf_quantised import Quantised
from ..checkpoint.resolve import budgets
from ..checkpoint.source import Source, open_source
from ..checkpoint.torch_dist import DistFiles
from ..errors import UserError
from ..quantization.presets import PRESETS
from ..recipe import Recipe
from ..router import BudgetRouter
from ..router.loss import relative_target
from ..space import ElasticSpace, ParentShape
from .distill import DistilledChunk
from .experts import expert_execution, moe_overrides
from .family import DTYPES
from .leaves import can_be_sliced, leaves
from .overlap import Submodels
from .quantizers import QuantisedLinears, Rounding, round_alike
from .teacher_cache import TeacherCache


@dataclass(frozen=True)
class Model:
    """The student and what trains it, on this rank.

    Args:
        chunks: its pipeline chunks, bare; the router hangs on the first one of every stage.
        ddp: the chunks with the teacher's beside them, wrapped by Megatron's ``DistributedDataParallel``.
        optimizer: Megatron's.
    """

    chunks: list[nn.Module]
    ddp: list[Any]
    optimizer: Any
    space: ElasticSpace | None
    router: BudgetRouter | None

    @property
    def pairs(self) -> list[DistilledChunk]:
        """The chunks, each with the teacher's."""
        return [d.module for d in self.ddp]

    @property
    def submodels(self) -> list[SlicedModel]:
        """What runs micro-batches on their own widths; empty where none can be."""
        return [pair.submodels for pair in self.pairs if pair.submodels is not None]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Outside training steps: parameters are complete, though their gathering overlaps with steps."""
        late = [d for d in self.ddp if d.ddp_config.overlap_param_gather]
        for d in late:
            d.disable_forward_pre_hook(param_sync=True)
        try:
            yield
        finally:
            for d in late:
                d.enable_forward_pre_hook()


def build_student(
    recipe: Recipe,
    source: Source,
    space: ElasticSpace | None,
    teacher: Sequence[nn.Module | None] = (),
    rounding: Rounding | None = None,
) -> Model:
    """The student, filled from ``source``.

    Args:
        teacher: its frozen chunks.
        rounding: of its linears, where they are quantised.
    """
    dtype = DTYPES[recipe.model.dtype]
    if dtype is torch.bfloat16 and not recipe.parallel.distributed_optimizer:
        raise UserError(
            "parallel.distributed_optimizer is false, but without it Megatron cannot save the fp32 parameters of a "
            "bf16 model (A_log, D, the router); set it to true, or model.dtype to fp32"
        )
    overrides = moe_overrides(recipe, source)
    if recipe.parallel.recompute == "full":
        overrides |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    quantised, shape = None if rounding is None else rounding.quantised, source.manifest.shape
    spec = leaves(recipe, shape, space, quantised, frozen=recipe.router_frozen)
    chunks = build_chunks(
        lambda vp_stage: bare_model(recipe, shape, space, spec=spec, vp_stage=vp_stage, **overrides)
    )
    router = None
    if space is not None and not recipe.router_frozen:
        router = build_router(recipe, space).to(next(chunks[0].parameters()).device)
        if rounding is not None:  # the one that chose the widths goes on
            _check_router(source)
            chunks[0].budget_router = router
    source.fill(chunks)
    check_finite(chunks, what=str(source.path))
    if router is not None:
        chunks[0].budget_router = router
    if rounding is not None:
        linears(chunks, recipe, shape, rounding.quantised).freeze(rounding.amax)
    for chunk in chunks:
        chunk.train()
    sliced = space is not None and can_be_sliced(recipe, space)
    ddp = _distributed(
        recipe, [DistilledChunk(*pair) for pair in zip_longest(chunks, teacher)], sliced=sliced
    )
    if sliced:
        for wrapped in ddp:
            wrapped.module.submodels = Submodels(wrapped, stock=spec, alike=round_alike)
    return Model(chunks, ddp, _optimizer(recipe, ddp, dtype), space, router)


def bare_model(recipe: Recipe, shape: ParentShape, space: ElasticSpace | None, **settings: Any) -> nn.Module:
    """An empty student, elastic over ``space``; ``settings`` as of ``build_model``."""
    dtype = DTYPES[recipe.model.dtype]
    if space is not None:
        return build_elastic_model(space, dtype=dtype, **settings)
    return build_model(shape, dtype=dtype, **settings)


def linears(
    chunks: Sequence[nn.Module], recipe: Recipe, shape: ParentShape, quantised: Quantised
) -> QuantisedLinears:
    """The linears of bare chunks that the recipe quantises, with their quantisers."""
    wanted = recipe.quantize
    assert wanted is not None
    return QuantisedLinears(chunks, shape, quantised, PRESETS[wanted.preset].configs[wanted.format])


def _check_router(source: Source) -> None:
    saved = DistFiles(source.path).entries if tracker.is_checkpoint(source.path) else ()
    if not any(key.startswith(ROUTER) for key in saved):
        raise UserError(
            f"router.frozen is false, but {source.path} has no router that could go on; set router.frozen=true"
        )


def build_router(recipe: Recipe, space: ElasticSpace) -> BudgetRouter:
    """Replicated on every rank. Gradient norms count it once: as Megatron's shared embedding, on one stage."""
    named, r = budgets(recipe), recipe.router
    router = BudgetRouter(
        space,
        named,
        [relative_target(space, b) for b in named],
        inner_size=r.inner_size,
        init_std=r.init_std,
        pin_full=r.pin_full,
        seed=recipe.seed,
    )
    for parameter in router.parameters():
        parameter.shared = runtime.groups().pp.rank() > 0
    return router


def _distributed(recipe: Recipe, pairs: list[DistilledChunk], *, sliced: bool = False) -> list[Any]:
    """Wrap the chunks of this rank, with the communication that ``parallel.overlap`` asks for.

    Args:
        sliced: may micro-batches run submodels, so that ``Overlap`` asks for parameters?
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    parallel = recipe.parallel
    gather = parallel.overlap and parallel.distributed_optimizer
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap,
        overlap_param_gather=gather,
        align_param_gather=gather and sliced,
    )
    ddp = [
        DistributedDataParallel(pair.config, settings, pair, disable_bucketing=index > 0)
        for index, pair in enumerate(pairs)
    ]
    for pair in pairs:
        if parallel.overlap:
            pair.config.no_sync_func = [d.no_sync for d in ddp] if len(ddp) > 1 else ddp[0].no_sync
        if gather and not sliced:
            syncs = [d.start_param_sync for d in ddp]
            pair.config.param_sync_func = syncs if len(ddp) > 1 else syncs[0]
    return ddp


def _optimizer(recipe: Recipe, ddp: list[Any], dtype: torch.dtype) -> Any:
    """Megatron's Adam: the router at its own rate, and no parameter group of two types."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey

    o = recipe.optimizer
    settings = OptimizerConfig(
        optimizer="adam", lr=o.lr, min_lr=o.min_lr, weight_decay=o.weight_decay, adam_beta1=o.betas[0],
        adam_beta2=o.betas[1], adam_eps=o.eps, clip_grad=o.clip_grad, bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
        overlap_param_gather=recipe.parallel.overlap and recipe.parallel.distributed_optimizer,
    )  # fmt: skip
    r = recipe.router
    groups = {
        # no weight decay, said by its bounds: Megatron finds groups in a checkpoint by their overrides, and these
        # must differ from those below also where the learning rates are equal
        ParamKey(name="*budget_router.*"): {
            "max_lr": r.lr,
            "min_lr": o.min_lr * r.lr / o.lr,
            "start_wd": 0.0,
            "end_wd": 0.0,
        },
        # fp32 in a bf16 model too, and Megatron cannot save a parameter group of two types; mamba-ssm
        # exempts both from weight decay
        ParamKey(name=("*.mixer.A_log", "*.mixer.D")): {"wd_mult": 0.0},
    }
    return get_megatron_optimizer(settings, ddp, config_overrides=groups)


def build_teacher(recipe: Recipe, source: Source) -> list[nn.Module]:
    """Chunks of the frozen parent (or another checkpoint) in evaluation mode.

    None for plain cross-entropy, and where the teacher's cache stands for it.
    """
    if recipe.loss.kind == "cross_entropy" or recipe.teacher.cache_only:
        return []
    chosen = teacher_source(recipe, source)
    build = partial(build_model, chosen.manifest.shape, dtype=DTYPES[recipe.model.dtype])
    if chosen.manifest.shape.num_moe_experts:
        build = partial(build, **expert_execution(recipe))
    teacher = build_chunks(lambda vp_stage: build(vp_stage=vp_stage))
    chosen.fill(teacher)
    check_finite(teacher, what=str(chosen.path))
    return [chunk.requires_grad_(False).eval() for chunk in teacher]


def teacher_source(recipe: Recipe, source: Source) -> Source:
    """The model that is distilled: the parent, or another. Raises ``UserError`` where it cannot be."""
    if recipe.teacher.checkpoint is None and recipe.model.sizes is not None:
        raise UserError(
            f"loss.kind {recipe.loss.kind} distils the parent, but model.sizes starts from random weights; train "
            "a parent first and name it in model.checkpoint, or name a teacher.checkpoint"
        )
    chosen = source if recipe.teacher.checkpoint is None else open_source(recipe.teacher.checkpoint)
    if chosen.manifest.shape.vocab_size != source.manifest.shape.vocab_size:
        raise UserError(
            f"teacher.checkpoint has vocabulary {chosen.manifest.shape.vocab_size}, the parent "
            f"{source.manifest.shape.vocab_size}; distillation needs one tokenizer"
        )
    return chosen


def open_teacher_cache(recipe: Recipe, source: Source) -> TeacherCache | None:
    """The cache of what the teacher says, where the recipe has one; collective."""
    if recipe.teacher.cache is None:
        return None
    return TeacherCache.open(recipe, teacher_source(recipe, source))
