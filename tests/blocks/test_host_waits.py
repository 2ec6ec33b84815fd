"""What a micro-batch makes the host wait for: the device's answers, counted as torch is asked for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import build_elastic, run, scalar, spec_of, subspace, tokens
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from elastic_megatron.blocks import SlicedModel
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.router import BudgetRouter, RouterStep, budget_loss
from elastic_megatron.space import Budget, ElasticSpace

# what a CUDA device answers before the host may go on; `lift_fresh` is a tensor made of Python's numbers, which is
# copied to the device from memory that is not pinned
WAITS = (
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim", "lift_fresh",
)  # fmt: skip
SPACE = subspace()
METRICS = ("active_params", "memory_bytes")


# of these the dispatcher of a CPU sees nothing
ASKED = {Tensor.tolist: "tolist", Tensor.cpu: "cpu", Tensor.numpy: "numpy"}


class Asked(TorchFunctionMode):
    """Counts values that Python takes from a tensor in one piece."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKED:
            self.found[ASKED[func]] += 1
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts what a host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.asked = Asked(self.found)

    def __enter__(self) -> Any:
        self.asked.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.asked.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in WAITS or (name == "index" and any(_flags(i) for i in args[1])):
            self.found[name] += 1
        return func(*args, **kwargs)


def _flags(index: Tensor | None) -> bool:
    """Positions from a mask of truth values are counted on the device, and the host waits for their number."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)


@pytest.fixture(scope="module")
def model(megatron: Any) -> Any:
    return build_elastic(SPACE, dtype=torch.float32, moe_aux_loss_coeff=0.0).train()


def waits_of(step: Callable[[int], Tensor]) -> Counter[str]:
    """Of one micro-batch, forward and backward, after one that filled the caches."""
    scalar(step(0)).backward()
    with Waits() as waits:
        scalar(step(1)).backward()
    return waits.found


class Draws:
    """The mixes of a step's micro-batches, and the budget router's loss of each."""

    def __init__(self, metric: str, *, hard: bool) -> None:
        self.budget, self.hard = Budget("small", metric, 0.6), hard
        self.step = RouterStep(BudgetRouter(SPACE, [self.budget], [0.6]))

    def __call__(self, seed: int) -> tuple[SubmodelMix, Tensor]:
        mix = self.step.mix(self.budget, key=("waits", seed), tau=1.0, logit_scale=1.0, hard=self.hard)
        return mix, budget_loss(mix, self.budget, identity_weight=1.0)[0]


@pytest.mark.parametrize("metric", METRICS)
def test_masked_execution_waits_for_nothing_that_the_parent_does_not(model: Any, metric: str) -> None:
    """Experts are counted on the host either way; sampling, masks and the router's loss ask for nothing."""
    draws = Draws(metric, hard=False)

    def soft(seed: int) -> Tensor:
        mix, loss = draws(seed)
        return run(model, mix, tokens(SPACE)) + loss

    plain = waits_of(lambda _: run(model, None, tokens(SPACE)))
    assert plain["tolist"] and waits_of(soft) == plain


@pytest.mark.parametrize("weighted", [1.0, 0.5])
def test_frozen_widths_wait_for_nothing_that_the_plain_model_does_not(model: Any, weighted: float) -> None:
    """Sliced execution of a family's sizes: the host knows them."""
    submodels = SlicedModel(model)
    mixes = {n: SubmodelMix.one_hot(SPACE, spec_of(SPACE, hidden_size=n)) for n in (35, 16)}

    def sliced(width: int) -> Callable[[int], Tensor]:
        return lambda _: submodels.forward(mixes[width].weighted(weighted), *tokens(SPACE), None)

    plain = waits_of(lambda _: run(model, None, tokens(SPACE)))
    assert waits_of(sliced(35)) == plain == waits_of(sliced(16))


def test_a_hard_draw_is_asked_for_once_whatever_the_number_of_axes(model: Any) -> None:
    submodels, draws = SlicedModel(model), Draws("active_params", hard=True)

    known = SubmodelMix.one_hot(SPACE, draws(1)[0].argmax())

    def sliced(_: int) -> Tensor:
        mix, loss = draws(1)
        return submodels.forward(mix, *tokens(SPACE), None) + loss

    frozen = waits_of(lambda _: submodels.forward(known, *tokens(SPACE), None))
    assert len(SPACE.axes) > 5 and waits_of(sliced) == frozen + Counter(tolist=1)


def test_what_a_draw_sends_to_the_device_does_not_block(space: ElasticSpace = SPACE) -> None:
    """Noise is drawn on the CPU; it travels without the host waiting for it."""
    sent: list[bool] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "_to_copy" and kwargs.get("device") == torch.device("meta"):
                sent.append(kwargs.get("non_blocking", False))
            return func(*args, **(kwargs or {}))

    budget = Budget("small", "active_params", 0.6)
    device_router = BudgetRouter(space, [budget], [0.6]).to("meta")
    sent.clear()
    with Copies():
        device_router(budget, key=("x",), tau=1.0, logit_scale=1.0, hard=False)
    assert len(sent) == len(space.axes) and all(sent)
