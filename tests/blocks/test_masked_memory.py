"""Masked execution keeps for its backward pass what the stock model keeps, and little more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import build_elastic, one_hot, run, soft_mix, subspace, tokens
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from elastic_megatron.ops import SubmodelMix
from elastic_megatron.ops.saving import recomputed, rescaled


class Made(TorchDispatchMode):
    """The storages of the tensors made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[StorageWeakRef] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.storages.add(StorageWeakRef(t.untyped_storage()))
        return out

    def alive(self) -> int:
        """Bytes that they have now."""
        found = (torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self.storages)
        return sum(storage.nbytes() for storage in found if storage is not None)


def kept(forward: Callable[[], Tensor]) -> int:
    """Bytes that are alive after a forward pass, for the sake of its backward pass."""
    with Made() as made:
        out = forward()
    found = made.alive()
    del out
    return found


def test_soft_masks_keep_hardly_more_than_the_parent(megatron: Any) -> None:
    """What remains is one activation a layer: what it writes, for the gradient of the mask of that."""
    space = subspace("MEM*E-M", per_layer=False, hidden_size=34, moe_ffn_hidden_size=66, ffn_hidden_size=140)
    model, inputs = build_elastic(space, torch.float32), tokens(space, 2, 64)
    mix = soft_mix(space, 3)
    mix = SubmodelMix(space, {a: p.float() for a, p in mix.probs.items()})
    plain, masked = (kept(lambda m=m: run(model, m, inputs)) for m in (None, mix))
    # the writes of 7 layers and of the embedding
    assert masked - plain <= 8 * 128 * 34 * 4 + 0.02 * plain


def test_one_hot_masks_keep_no_more_than_the_parent(megatron: Any) -> None:
    space = subspace(per_layer=False)
    model, inputs = build_elastic(space, torch.float32), tokens(space, 2, 64)
    mix = one_hot(space, space.smallest(), torch.float32)
    assert kept(lambda: run(model, mix, inputs)) <= 1.02 * kept(lambda: run(model, None, inputs))


@pytest.mark.parametrize(
    "kind", [nn.Linear(6, 4), nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 4)), nn.Tanh()]
)
def test_a_product_that_is_computed_again_gives_the_same_gradients(kind: nn.Module) -> None:
    """Of zeros in the factor too, and also where the module saves a view of the product, or none of it."""
    module = kind.double()
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 6, generator=g, dtype=torch.float64, requires_grad=True)
    factor = torch.tensor([0.0, 1.0, 0.5, -2.0, 1e-310, 3.0], dtype=torch.float64, requires_grad=True)
    inputs = [x, factor, *module.parameters()]
    wanted = torch.autograd.grad(module(x * factor).square().sum(), inputs)
    product = x * factor
    out = module(product)
    recomputed(product, x, factor, before=out.grad_fn)
    assert product.untyped_storage().nbytes() == 0
    found = torch.autograd.grad(out.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_rescaled_activation_has_the_gradients_of_a_product(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(4, 7, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(4, 7, generator=g, dtype=torch.float64).to(dtype)
    factor = torch.tensor(
        0.7, dtype=torch.float64 if dtype is torch.float64 else torch.float32, requires_grad=True
    )
    out = rescaled(x, factor)
    assert out.dtype is dtype and torch.equal(out, x * factor)
    found = torch.autograd.grad((out * weight).sum(), [x, factor])
    wanted = torch.autograd.grad((x * factor * weight).sum(), [x, factor])
    limit = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype is b.dtype
        assert (a.double() - b.double()).norm() <= limit * b.double().norm()


@pytest.mark.parametrize("module", [nn.Tanh(), nn.Linear(6, 6)])
def test_a_forward_pass_without_a_backward_pass_leaves_nothing(module: nn.Module) -> None:
    """Also where a module saves what it returns."""
    x, factor = torch.ones(4, 6, requires_grad=True), torch.ones(6, requires_grad=True)
    product = x * factor
    out = module(product)
    recomputed(product, x, factor, before=out.grad_fn)
    made = [StorageWeakRef(t.untyped_storage()) for t in (product, out)]
    del product, out
    assert all(memory.expired() for memory in made)
