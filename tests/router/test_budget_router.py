"""The budget router: a pure function of weights, budget and key, whose loss is the distance to the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import soft_mix, spec_of, subspace

from elastic_megatron.cost import metric, sizes_of_spec
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.router import BudgetRouter, Schedule, budget_loss, relative_cost
from elastic_megatron.router.loss import relative_target, target_cost
from elastic_megatron.space import Budget, ElasticSpace

SPACE = subspace()
BUDGETS = (
    Budget("small", "active_params", 0.5),
    Budget("large", "active_params", 1.0),
    Budget("medium", "active_params", 0.7),
)
SAMPLE: dict[str, Any] = {"tau": 0.9, "logit_scale": 2.0}


def router(
    space: ElasticSpace = SPACE, budgets: tuple[Budget, ...] = BUDGETS, **settings: Any
) -> BudgetRouter:
    return BudgetRouter(space, budgets, [relative_target(space, b) for b in budgets], **settings)


def test_budgets_are_ordered_by_target() -> None:
    r = router()
    assert [b.name for b in r.budgets] == ["large", "medium", "small"] and list(r.targets) == [1.0, 0.7, 0.5]


def test_training_budgets_are_one_hot() -> None:
    r = router()
    assert r.encode("large").tolist() == [1, 0, 0] and r.encode(BUDGETS[0]).tolist() == [0, 0, 1]
    assert torch.equal(r.encode(0.7), r.encode("medium"))


@given(st.integers(0, 1200).map(lambda i: i / 1000))
def test_other_targets_interpolate_and_beyond_them_the_nearest_is_taken(target: float) -> None:
    r = router()
    code = r.encode(target)
    assert float(code.sum()) == pytest.approx(1) and (code >= 0).all() and int((code > 0).sum()) <= 2
    blended = float((code.double() * torch.tensor(r.targets, dtype=torch.float64)).sum())
    assert blended == pytest.approx(min(max(target, 0.5), 1.0), abs=1e-6)


def test_choices_are_deterministic_and_legal() -> None:
    r = router()
    for budget in ("small", "medium", 0.61):
        specs = []
        for seed in range(3):
            torch.manual_seed(seed)
            specs.append(r.choose(budget))
        assert specs[0] == specs[1] == specs[2]
        SPACE.check(specs[0])
    with torch.no_grad():
        logits = r.logits("small")
    for a, choice in r.choose("small").to_dict().items():
        rows = logits[a] if logits[a].dim() == 2 else logits[a][None]
        wanted = [SPACE.choices_of(a)[int(row.argmax())] for row in rows]
        assert choice == (wanted if a in SPACE.per_layer else wanted[0])


def test_the_same_seed_builds_the_same_router() -> None:
    a, b, c = router(seed=1), router(seed=1), router(seed=2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True))


@pytest.mark.parametrize("budget", ["large", BUDGETS[1]])
def test_the_full_budget_is_pinned_to_the_parent(budget: Any) -> None:
    r = router()
    mix = r(budget, key=(1,), hard=False, **SAMPLE)
    full = SubmodelMix.one_hot(SPACE, SPACE.full())
    assert all(torch.equal(mix.probs[a], full.probs[a]) for a in SPACE.axes)
    assert r.choose(budget) == SPACE.full() == r.probabilities(budget).argmax()
    loose = router(pin_full=False)
    assert loose(budget, key=(1,), hard=False, **SAMPLE).probs["hidden_size"].max() < 1


def test_a_nearly_full_budget_is_not_pinned() -> None:
    budgets = (Budget("most", "active_params", 0.999), Budget("small", "active_params", 0.5))
    assert router(budgets=budgets)("most", key=(1,), hard=False, **SAMPLE).probs["hidden_size"].max() < 1


@pytest.mark.parametrize("hard", [False, True])
def test_samples_are_functions_of_their_key(hard: bool) -> None:
    r = router()

    def sample(*key: Any) -> dict[str, torch.Tensor]:
        return r("small", key=key, hard=hard, **SAMPLE).probs

    first = sample(1, "gumbel", 3, 0, 0)
    torch.manual_seed(99)
    assert all(torch.equal(p, first[a]) for a, p in sample(1, "gumbel", 3, 0, 0).items())
    others = [sample(1, "gumbel", step, m, rank) for step, m, rank in ((4, 0, 0), (3, 1, 0), (3, 0, 1))]
    for other in others:
        assert any(not torch.equal(p, first[a]) for a, p in other.items())


def test_noise_is_independent_between_axes_and_between_layers() -> None:
    """Axes with equally many choices and equal logits disagree as often as chance says; so do layers."""
    space = ElasticSpace.build(
        SPACE.parent,
        {"mamba_head_dim": [3], "hidden_size": [16], "mamba_num_heads": [2]},
        per_layer=["mamba_num_heads"],
    )
    r = router(space)
    for p in r.parameters():
        torch.nn.init.zeros_(p)
    drawn, n = [], 2000
    for i in range(n):
        probs = r("small", key=(7, "gumbel", i, 0, 0), hard=True, **SAMPLE).probs
        drawn.append(
            torch.cat([probs["hidden_size"][:1], probs["mamba_head_dim"][:1], probs["mamba_num_heads"][:, 0]])
        )
    correlation = torch.corrcoef(torch.stack(drawn, 1).detach())
    off = correlation - torch.eye(len(correlation))
    assert off.abs().max() < 5 / n**0.5


def test_per_layer_axes_have_a_row_for_each_layer() -> None:
    probs = router()("small", key=(1,), hard=False, **SAMPLE).probs
    for a in SPACE.axes:
        rows = (len(SPACE.layers(a)),) if a in SPACE.per_layer else ()
        assert probs[a].shape == (*rows, len(SPACE.choices_of(a)))
        assert torch.allclose(probs[a].sum(-1), torch.ones(rows))
    assert probs["mamba_num_heads"].std(0).max() > 0


@pytest.mark.parametrize("hard", [False, True])
def test_gradient_reaches_every_head(hard: bool) -> None:
    r = router()
    for step in range(10):  # a hard sample may leave out all layers of a type
        loss, _ = budget_loss(r("small", key=(step,), hard=hard, **SAMPLE), BUDGETS[0])
        loss.backward()
    for name, p in r.named_parameters():
        assert p.grad is not None and p.grad.any(), name


@given(
    st.integers(0, 10**6),
    st.sampled_from(["active_params", "total_params", "memory_bytes"]),
    st.integers(1, 99),
)
def test_the_loss_is_the_relative_distance_to_the_target(seed: int, kind: str, percent: int) -> None:
    mix, budget = soft_mix(SPACE, seed), Budget("b", kind, percent / 100)
    loss, cost = budget_loss(mix, budget)
    truth = float(metric(mix.sizes(), budget)) / (
        percent / 100 * float(metric(sizes_of_spec(SPACE, SPACE.full()), budget))
    )
    assert float(cost) == pytest.approx(truth, rel=1e-6) and not cost.requires_grad
    assert float(loss.detach()) == pytest.approx(abs(truth - 1), rel=1e-5, abs=1e-9)


def test_ratio_and_absolute_targets_agree() -> None:
    full = float(metric(sizes_of_spec(SPACE, SPACE.full()), BUDGETS[0]))
    ratio, absolute = Budget("a", "active_params", 0.5), Budget("b", "active_params", 0.5 * full, "absolute")
    assert target_cost(SPACE, ratio) == target_cost(SPACE, absolute) == 0.5 * full
    assert relative_target(SPACE, absolute) == pytest.approx(0.5)
    assert relative_cost(SPACE, ratio, SPACE.full()) == pytest.approx(2.0)


def test_errors_inside_the_dead_zone_cost_nothing() -> None:
    mix = soft_mix(SPACE, 0)
    _, cost = budget_loss(mix, Budget("b", "active_params", 0.5))
    error = abs(float(cost) - 1)
    for zone, free in ((1.1 * error, True), (0.9 * error, False)):
        loss, _ = budget_loss(mix, Budget("b", "active_params", 0.5), dead_zone=zone)
        grads = torch.autograd.grad(loss, mix.tensors(), allow_unused=True)
        assert (float(loss) == 0) == free
        assert all(g is None or not g.any() for g in grads) == free


def test_the_identity_regulariser_pulls_the_full_budget_to_the_largest_choices() -> None:
    mix, full = soft_mix(SPACE, 0), Budget("large", "active_params", 1.0)
    plain, _ = budget_loss(mix, full)
    pulled, _ = budget_loss(mix, full, identity_weight=10.0)
    truth = 0.0
    for p in mix.probs.values():
        target = torch.zeros_like(p)
        target[..., 0] = 1
        truth += 10.0 * float(((p - target) ** 2).mean())
    assert float(pulled - plain) == pytest.approx(truth)
    one_hot = SubmodelMix.one_hot(SPACE, SPACE.full())
    assert float(budget_loss(one_hot, full, identity_weight=10.0)[0]) == pytest.approx(0, abs=1e-6)
    other = Budget("small", "active_params", 0.5)
    assert float(budget_loss(mix, other, identity_weight=10.0)[0]) == float(budget_loss(mix, other)[0])


@pytest.mark.parametrize(
    ("hard", "kind", "tolerance"),
    [(False, "active_params", 0.05), (False, "total_params", 0.05), (True, "active_params", 0.15)],
)
def test_the_budget_loss_alone_finds_the_budget(hard: bool, kind: str, tolerance: float) -> None:
    """The realised cost of the chosen submodel comes close to each target; hard samples are noisier."""
    budgets = tuple(Budget(n, kind, t) for n, t in (("full", 1.0), ("medium", 0.75), ("small", 0.55)))
    steps, r = 120, router(budgets=budgets, inner_size=32)
    tau, scale = Schedule(1.0, 0.05, geometric=True), Schedule(1.0, 10.0)
    optimizer = torch.optim.Adam(r.parameters(), lr=2e-2)
    for step in range(steps):
        optimizer.zero_grad()
        for m, budget in enumerate(budgets[1:]):
            sample = {"tau": tau.at(step, steps), "logit_scale": scale.at(step, steps)}
            budget_loss(r(budget, key=(0, step, m), hard=hard, **sample), budget)[0].backward()
        optimizer.step()
    for budget in budgets:
        assert abs(relative_cost(SPACE, budget, r.choose(budget)) - 1) < tolerance, budget


def test_the_state_lives_under_one_prefix() -> None:
    holder = torch.nn.Module()
    holder.budget_router = router()
    names = list(holder.state_dict())
    assert names and all(n.startswith("budget_router.heads.") for n in names)
    assert {n.split(".")[2] for n in names} == set(SPACE.axes)


def test_schedules_hit_both_ends() -> None:
    tau, scale = Schedule(1.0, 0.05, geometric=True), Schedule(1.0, 10.0)
    assert tau.at(0, 101) == 1.0 and tau.at(100, 101) == pytest.approx(0.05) == tau.at(500, 101)
    assert tau.at(50, 101) == pytest.approx(0.05**0.5) and scale.at(50, 101) == pytest.approx(5.5)
    assert scale.at(0, 1) == 1.0 and scale.at(-3, 10) == 1.0


def test_relative_cost_of_a_heterogeneous_submodel_is_exact() -> None:
    spec = spec_of(SPACE, num_moe_experts=[4, 8], mamba_num_heads=[2, 4, 6])
    mix = SubmodelMix.one_hot(SPACE, spec, dtype=torch.float64)
    assert float(budget_loss(mix, BUDGETS[0])[1]) == pytest.approx(
        relative_cost(SPACE, BUDGETS[0], spec), rel=1e-12
    )
