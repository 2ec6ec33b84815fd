"""One step without an optimizer in fp64: what the ranks do in the gradient tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from precision import keep_fp64
from ranking_jobs import random_state
from torch import Tensor
from training_jobs import parent_of

from elastic_megatron.blocks import build_chunks, build_elastic_model, build_model
from elastic_megatron.checkpoint.resolve import budgets, elastic_space
from elastic_megatron.checkpoint.shards import by_name, fill
from elastic_megatron.recipe import load
from elastic_megatron.router import BudgetRouter
from elastic_megatron.router.loss import relative_target
from elastic_megatron.training.batches import Batches
from elastic_megatron.training.curriculum import Curriculum
from elastic_megatron.training.distill import DistilledChunk
from elastic_megatron.training.family import parent_source
from elastic_megatron.training.start import start
from elastic_megatron.training.step import ForwardStep

RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def gradients(file: str, moe: bool, recompute: bool) -> dict[str, dict[str, Tensor]]:
    """Of a recipe's first step: the whole gradient of the router's logits, this rank's of the weights."""
    with pytest.MonkeyPatch.context() as patch:
        keep_fp64(patch)
        return _gradients(file, moe, RECOMPUTE if recompute else {})


def _gradients(file: str, moe: bool, overrides: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    recipe, parent = load(Path(file)), parent_of(moe)
    space = elastic_space(recipe, parent_source(recipe).manifest)
    assert space is not None
    start(recipe, parent, space)
    how: dict[str, Any] = {"dtype": torch.float64}
    if moe:
        how |= {
            "moe_token_dispatcher_type": recipe.parallel.dispatcher,
            "moe_router_load_balancing_type": "seq_aux_loss",
            "moe_aux_loss_coeff": 0.1,
        }
    students = build_chunks(lambda v: build_elastic_model(space, vp_stage=v, **how, **overrides).train())
    teachers = build_chunks(lambda v: build_model(parent, vp_stage=v, **how).eval())
    for seed, chunks in ((3, students), (4, teachers)):
        fill(by_name(chunks, parent), ((n, t.double()) for n, t in random_state(parent, seed).items()))
    named = budgets(recipe)
    router = BudgetRouter(space, named, [relative_target(space, b) for b in named], inner_size=16)
    step = ForwardStep(recipe, router.double(), 100)
    step.begin()
    assert step.router_step is not None
    pairs = [DistilledChunk(*pair) for pair in zip(students, teachers, strict=True)]
    batches = Batches(Curriculum(recipe), parent.vocab_size, torch.device("cpu")).of_step(0)
    stage, several = recipe.stages[0], len(pairs) > 1
    get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in pairs] if several else iter(batches),
        model=pairs if several else pairs[0],
        num_microbatches=len(batches),
        seq_length=stage.seq_length,
        micro_batch_size=stage.micro_batch_size,
        decoder_seq_length=stage.seq_length,
        forward_only=False,
    )
    logits = {}
    for name, leaves in step.router_step.leaves.items():
        for axis, leaf in leaves.items():
            logits[f"{name}.{axis}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            torch.distributed.all_reduce(logits[f"{name}.{axis}"])
    weights = {
        f"{i}.{n}": p.grad
        for i, c in enumerate(students)
        for n, p in c.named_parameters()
        if p.grad is not None
    }
    return {"logits": logits, "weights": weights}
