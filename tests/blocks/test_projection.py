"""A projection makes the logits that its model makes, and carries their gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from laws import build_elastic, one_hot, soft_mix, subspace, tokens
from torch import Tensor

from elastic_megatron.blocks import SlicedModel, projection, running
from elastic_megatron.ops import Projection

SPACES = {"untied": subspace(), "tied": subspace(tie_embeddings=True)}

pytestmark = pytest.mark.usefixtures("fp64")


@pytest.fixture(scope="module", params=SPACES)
def model(megatron: Any, request: pytest.FixtureRequest) -> Any:
    return build_elastic(SPACES[request.param]).train()


def inputs(model: Any) -> tuple[Tensor, Tensor, None]:
    return *tokens(model.decoder.space), None


def logits_of(projected: Projection) -> Tensor:
    return projected.hidden @ projected.weight.T


def as_(name: str, model: Any) -> AbstractContextManager[None]:
    """A context in which the model is whole, a submodel, or a mix of them."""
    space = model.decoder.space
    if name == "whole":
        return nullcontext()
    return running(model, one_hot(space, space.smallest()) if name == "smallest" else soft_mix(space, 1))


@pytest.mark.parametrize("name", ["whole", "smallest", "soft"])
def test_logits_and_gradients_of_a_projection_are_the_models(model: Any, name: str) -> None:
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for call in (lambda *a: logits_of(projection(*a)), lambda model, *a: model(*a)):
        model.zero_grad()
        with as_(name, model):
            logits = call(model, *inputs(model))
        logits.square().sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), grads))
    (mine, my_grads), (theirs, their_grads) = found
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert my_grads.keys() == their_grads.keys()
    for n, grad in their_grads.items():
        assert float((my_grads[n] - grad).norm()) <= 1e-12 * float(grad.norm()), n


def test_the_weight_is_the_one_that_has_the_gradient(model: Any) -> None:
    projected = projection(model, *inputs(model))
    shared = model.share_embeddings_and_output_weights
    assert projected.weight is (model.embedding.word_embeddings if shared else model.output_layer).weight
    assert projected.hidden.shape == (2, 13, 35)


def test_a_submodel_on_its_own_widths_projects_fewer_channels(model: Any) -> None:
    space = model.decoder.space
    mix = one_hot(space, space.smallest())
    sliced = SlicedModel(model).forward(mix, *inputs(model), call=projection)
    assert sliced.hidden.shape[-1] == sliced.weight.shape[-1] == 16
    with running(model, mix):
        masked = projection(model, *inputs(model))
    torch.testing.assert_close(logits_of(sliced), logits_of(masked), rtol=1e-10, atol=1e-10)


def test_the_output_layer_makes_no_logits_and_is_itself_again_afterwards(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = model.output_layer
    before = dict(vars(head))

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("logits")

    monkeypatch.setattr(head, "_forward_impl", never)
    projection(model, *inputs(model))
    monkeypatch.undo()
    assert vars(head) == before
    monkeypatch.setattr(type(model.decoder), "forward", never)
    with pytest.raises(AssertionError, match="logits"):
        projection(model, *inputs(model))
    assert vars(head) == before


def test_what_runs_before_the_output_layer_runs(model: Any) -> None:
    """As Megatron's hook that waits for gathered parameters, or one that changes the hidden states."""
    hook = model.output_layer.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    try:
        doubled = projection(model, *inputs(model)).hidden
    finally:
        hook.remove()
    assert torch.equal(doubled, 2 * projection(model, *inputs(model)).hidden)


def test_an_output_layer_whose_logits_would_be_others_is_refused(model: Any) -> None:
    head = model.output_layer
    hook = head.register_forward_hook(lambda *_: None)
    with pytest.raises(AssertionError, match="hook"):
        projection(model, *inputs(model))
    hook.remove()
    for enabled in (True, False):
        head.__dict__["weight_quantizer"] = SimpleNamespace(is_enabled=enabled)
        try:
            if not enabled:
                projection(model, *inputs(model))
                continue
            with pytest.raises(AssertionError, match="quantised"):
                projection(model, *inputs(model))
        finally:
            del head.__dict__["weight_quantizer"]
