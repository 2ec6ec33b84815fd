"""GroupStepAdam against torch's own Adam and AdamW."""

import pytest
import torch

from elastic_megatron.runtime.adam import GroupStepAdam


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [True, False])
def test_updates_equal_torch(decay: float, decoupled: bool) -> None:
    torch.manual_seed(0)
    start = [torch.randn(5, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    ours, theirs = ([t.clone().requires_grad_() for t in start] for _ in range(2))
    arguments = dict(lr=0.03, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay)
    reference = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizers = (GroupStepAdam(ours, adam_w_mode=decoupled, **arguments), reference(theirs, **arguments))
    for _ in range(5):
        gradients = [torch.randn_like(t) for t in start]
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g.clone()
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_step_is_kept_in_the_group_and_survives_a_state_dict() -> None:
    p = torch.zeros(2, requires_grad=True)
    optimizer = GroupStepAdam([p])
    p.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state_dict()
    assert state["param_groups"][0]["step"] == 1
    assert set(state["state"][0]) == {"exp_avg", "exp_avg_sq"}
    fresh = GroupStepAdam([p])
    fresh.load_state_dict(state)
    fresh.step()
    assert fresh.param_groups[0]["step"] == 2


def test_a_parameter_without_gradient_does_not_move() -> None:
    still, moving = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    moving.grad = torch.ones(2)
    GroupStepAdam([still, moving], weight_decay=0.1).step()
    assert bool((still == 1).all()) and bool((moving < 1).all())
