"""Building a submodel leaves no trace: neither in what is drawn later nor in memory that it does not need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from laws import build_elastic, one_hot, subspace, tokens
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from elastic_megatron.blocks import SlicedModel, build_model

SPACE = subspace()


@pytest.fixture(scope="module")
def model(megatron: Any) -> Any:
    return build_elastic(SPACE, dtype=torch.float32).train()


def generators() -> dict[str, Tensor]:
    """States of torch's own generator and of those that Megatron tracks."""
    return {
        "torch": torch.get_rng_state(),
        **{n: s.clone() for n, s in get_cuda_rng_tracker().get_states().items()},
    }


@contextmanager
def held() -> Iterator[list[int]]:
    """Bytes that the parameters built inside hold, each time a module registers one."""
    seen, sizes = list[nn.Parameter](), list[int]()

    def registered(_: nn.Module, __: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            seen.append(parameter)
            sizes.append(sum(p.untyped_storage().nbytes() for p in seen))

    hook = register_module_parameter_registration_hook(registered)
    try:
        yield sizes
    finally:
        hook.remove()


def test_building_draws_nothing_from_what_training_draws(model: Any) -> None:
    before = generators()
    SlicedModel(model).forward(one_hot(SPACE, SPACE.smallest(), torch.float32), *tokens(SPACE), None)
    after = generators()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    build_model(SPACE.parent)
    built = generators()
    assert not all(torch.equal(before[n], built[n]) for n in before), "the comparison is about nothing"


def test_a_submodel_is_built_in_the_memory_of_one_module(model: Any) -> None:
    """Weights are bound, or cut out, one by one: no second set of them lies beside, not even for a moment."""
    largest = max(sum(p.nbytes for p in m.parameters(recurse=False)) for m in model.modules())
    with held() as sizes:
        SlicedModel(model).model_of(SPACE.smallest())
    with held() as plain:
        build_model(SPACE.parent)
    assert len(sizes) > 10 and max(sizes) <= largest < max(plain) / 4
