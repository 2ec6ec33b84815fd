"""Losses of an evaluation are means over the scored tokens of every window, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import build_elastic, one_hot, subspace
from torch.nn import functional as F

from elastic_megatron.blocks import SlicedModel, running
from elastic_megatron.ops import distillation_loss
from elastic_megatron.space import SubmodelSpec
from elastic_megatron.training.distill import DistilledChunk
from elastic_megatron.training.evaluate import evaluate

SPACE = subspace()


def cut_before(submodels: SlicedModel, spec: SubmodelSpec) -> None:
    """Leave copies of other weights behind, as a training step does whose weights have changed since."""
    state = [(p, p.detach().clone()) for p in submodels.model.parameters()]
    with torch.no_grad():
        for parameter, _ in state:
            parameter.mul_(0.5)
        submodels.model_of(spec)
        for parameter, value in state:
            parameter.copy_(value)


@pytest.mark.parametrize("batch_size", [2, 16])
@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("sliced", [False, True])
def test_losses_are_means_over_scored_tokens(
    megatron: Any, batch_size: int, taught: bool, sliced: bool
) -> None:
    student, teacher = (build_elastic(SPACE, torch.float32, seed) for seed in (1, 2))
    g = torch.Generator().manual_seed(3)
    windows = [torch.randint(0, 53, (n,), generator=g) for n in (9, 9, 9, 5, 9, 5)]
    specs = {"full": SPACE.full(), "small": SPACE.smallest()}
    submodels = SlicedModel(student.train()) if sliced else None
    pair = DistilledChunk(student, teacher.eval(), submodels)
    pair = pair if taught else pair.alone()
    if submodels is not None:
        cut_before(submodels, specs["small"])
    found = evaluate([pair], SPACE, specs, windows, batch_size=batch_size)
    assert student.training

    for name, spec in specs.items():
        ces, kls = [], []
        for window in windows:
            inputs = window[None], torch.arange(len(window))[None], None
            with torch.no_grad(), running(student.eval(), one_hot(SPACE, spec, torch.float32)):
                logits = student(*inputs)[0, :-1]
            ces.append(F.cross_entropy(logits, window[1:], reduction="none"))
            with torch.no_grad():
                reference = teacher(*inputs)[0, :-1]
            how: Any = {"kind": "forward_kl", "temperature": 1.0, "ce_weight": 0.0}
            kls.append(distillation_loss(logits, reference, window[1:], **how)[0])
        result = found[name]
        assert result["tokens"] == sum(len(w) - 1 for w in windows)
        assert result["loss"] == pytest.approx(float(torch.cat(ces).double().mean()), rel=1e-5)
        assert ("kl" in result) == taught
        if taught:
            assert result["kl"] == pytest.approx(float(torch.cat(kls).double().mean()), rel=1e-5)
