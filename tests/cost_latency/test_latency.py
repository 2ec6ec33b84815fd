"""The latency table: exact between its points, differentiable, and loud where it says nothing."""

import itertools
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_megatron.cost import metric, sizes_of_parent, sizes_of_spec
from elastic_megatron.cost.latency import Grid, LatencyTable
from elastic_megatron.errors import UserError
from elastic_megatron.ops.mix import SubmodelMix
from elastic_megatron.space import Budget, ElasticSpace, ParentShape, SubmodelSpec

SHAPE = ParentShape(
    "ME*ME", hidden_size=64, vocab_size=264, moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=32,
    num_moe_experts=8, moe_router_topk=2, mamba_num_heads=8, mamba_head_dim=16, mamba_state_dim=16,
    mamba_num_groups=2, num_attention_heads=4, num_query_groups=2, kv_channels=16,
)  # fmt: skip
SPACE = ElasticSpace.build(
    SHAPE,
    {"hidden_size": [32, 48, 64], "mamba_num_heads": [4, 6, 8], "num_moe_experts": [4, 8]},
    per_layer=["mamba_num_heads"],
)
HIDDEN, HEADS = [32, 48, 64], [4, 8]


def document() -> dict[str, Any]:
    """A table in which no two numbers are alike, on grids coarser than the choices."""
    return {
        "format_version": 1,
        "device": "test",
        "tokens": 128,
        "unit": "seconds",
        "shape": {"mamba_head_dim": 16, "moe_ffn_hidden_size": 32},
        "symbols": {
            "M": {
                "axes": {"hidden_size": HIDDEN, "mamba_num_heads": HEADS},
                "seconds": [[0.10, 0.17], [0.13, 0.29], [0.31, 0.37]],
            },
            "*": {"axes": {"hidden_size": [32, 64]}, "seconds": [0.05, 0.11]},
            "E": {
                "axes": {"hidden_size": [32, 64], "num_moe_experts": [4, 8]},
                "seconds": [[0.21, 0.23], [0.27, 0.41]],
            },
        },
        "ends": {"axes": {"hidden_size": [32, 64]}, "seconds": [0.5, 0.9]},
    }


@pytest.fixture
def table(tmp_path: Path) -> LatencyTable:
    return load(tmp_path, document())


def load(folder: Path, data: Any) -> LatencyTable:
    path = folder / "table.json"
    path.write_text(json.dumps(data))
    return LatencyTable.load(path)


def slow(axes: list[list[int]], seconds: dict[tuple[int, ...], float], at: list[float]) -> float:
    """Interpolate one axis after another, by the textbook formula."""
    if not axes:
        return seconds[()]
    grid = axes[0]
    at0 = min(max(at[0], grid[0]), grid[-1])

    def rest(value: int) -> float:
        return slow(axes[1:], {k[1:]: v for k, v in seconds.items() if k[0] == value}, at[1:])

    for low, high in itertools.pairwise(grid):
        if low <= at0 <= high:
            return rest(low) + (rest(high) - rest(low)) * (at0 - low) / (high - low)
    return rest(grid[0])


@st.composite
def grids(draw: st.DrawFn) -> tuple[Grid, list[list[int]], list[float]]:
    names = draw(st.sampled_from([["hidden_size"], ["hidden_size", "mamba_num_heads"],
                                  ["hidden_size", "moe_ffn_hidden_size", "num_moe_experts"]]))  # fmt: skip
    axes = [sorted(draw(st.sets(st.integers(1, 50), min_size=1, max_size=4))) for _ in names]
    points = list(itertools.product(*axes))
    seconds = [draw(st.integers(1, 1000)) / 1000 for _ in points]
    at = [draw(st.floats(0, 60)) for _ in names]
    grid = Grid(tuple((n, tuple(a)) for n, a in zip(names, axes, strict=True)), tuple(seconds))
    return grid, axes, at


@given(grids())
@settings(max_examples=100, deadline=None)
def test_numbers_and_tensors_equal_the_slow_interpolation(
    case: tuple[Grid, list[list[int]], list[float]],
) -> None:
    grid, axes, at = case
    expected = slow(axes, dict(zip(itertools.product(*axes), grid.seconds, strict=True)), at)
    names = [n for n, _ in grid.axes]
    assert grid.at(dict(zip(names, at, strict=True))) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    tensors = {n: torch.tensor(w, dtype=torch.float64) for n, w in zip(names, at, strict=True)}
    assert grid.at(tensors).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(grids())
@settings(max_examples=30, deadline=None)
def test_grid_points_are_exact(case: tuple[Grid, list[list[int]], list[float]]) -> None:
    grid, axes, _ = case
    for point, seconds in zip(itertools.product(*axes), grid.seconds, strict=True):
        sizes = dict(zip([n for n, _ in grid.axes], point, strict=True))
        assert grid.at(sizes) == seconds
        tensors = {n: torch.tensor(float(w), dtype=torch.float64) for n, w in sizes.items()}
        assert grid.at(tensors).item() == seconds


def test_vectors_are_interpolated_entry_by_entry(table: LatencyTable) -> None:
    grid = dict(table.symbols)["M"]
    heads, hidden = (
        torch.tensor([4.0, 5.0, 7.5, 9.0], dtype=torch.float64),
        torch.tensor(40.0, dtype=torch.float64),
    )
    got = grid.at({"hidden_size": hidden, "mamba_num_heads": heads})
    assert got.tolist() == pytest.approx(
        [grid.at({"hidden_size": 40, "mamba_num_heads": h}) for h in heads.tolist()]
    )


def test_gradients_equal_finite_differences(table: LatencyTable) -> None:
    torch.manual_seed(0)
    logits = [torch.randn(*n, dtype=torch.float64, requires_grad=True) for n in ((3,), (2,), (2, 3))]

    def seconds(*logits: torch.Tensor) -> torch.Tensor:
        by_size = {"hidden_size": logits[0], "num_moe_experts": logits[1], "mamba_num_heads": logits[2]}
        mix = SubmodelMix(SPACE, {a: by_size[a].softmax(-1) for a in SPACE.axes})
        return table.seconds(mix.sizes())

    assert seconds(*logits).shape == ()
    assert torch.autograd.gradcheck(seconds, logits, eps=1e-6, atol=1e-8)
    grads = torch.autograd.grad(seconds(*logits), logits)
    assert all((g != 0).all() for g in grads)


def test_slope_at_grid_points_and_beyond_the_edges(table: LatencyTable) -> None:
    """At an inner point the cell above, at the edges the only cell there is, and beyond them nothing."""

    def slope(hidden: float) -> float:
        w = torch.tensor(hidden, dtype=torch.float64, requires_grad=True)
        dict(table.symbols)["M"].at({"hidden_size": w, "mamba_num_heads": 4}).backward()
        assert w.grad is not None
        return w.grad.item()

    below, above = (0.13 - 0.10) / 16, (0.31 - 0.13) / 16
    expected = {20: 0.0, 32: below, 40: below, 48: above, 56: above, 64: above, 80: 0.0}
    assert {w: slope(w) for w in expected} == pytest.approx(expected)


def test_a_model_is_its_layers_and_its_ends(table: LatencyTable) -> None:
    assert table.seconds(sizes_of_parent(SHAPE)) == pytest.approx(2 * 0.37 + 2 * 0.41 + 0.11 + 0.9)
    spec = SubmodelSpec.of({"hidden_size": 48, "mamba_num_heads": [4, 6], "num_moe_experts": 4})
    mamba = 0.13 + (0.13 + 0.29) / 2
    expected = mamba + 2 * (0.21 + 0.27) / 2 + (0.05 + 0.11) / 2 + (0.5 + 0.9) / 2
    exact = table.seconds(sizes_of_spec(SPACE, spec))
    assert isinstance(exact, float) and exact == pytest.approx(expected)
    mix = SubmodelMix.one_hot(SPACE, spec, dtype=torch.float64)
    assert table.seconds(mix.sizes()).item() == pytest.approx(expected)


def test_latency_budgets_read_the_table(tmp_path: Path, table: LatencyTable) -> None:
    budget = Budget("fast", "latency", 0.5, table=str(tmp_path / "table.json"))
    assert metric(sizes_of_parent(SHAPE), budget) == table.seconds(sizes_of_parent(SHAPE))


def test_a_file_is_read_again_only_when_it_changed(tmp_path: Path, table: LatencyTable) -> None:
    assert LatencyTable.load(tmp_path / "table.json") is table
    data = document() | {"tokens": 256}
    (tmp_path / "table.json").write_text(json.dumps(data))
    os.utime(tmp_path / "table.json", ns=(1, 1))
    assert LatencyTable.load(tmp_path / "table.json").tokens == 256


def test_a_table_without_axes_holds_for_its_own_size_only(tmp_path: Path) -> None:
    data = document()
    data["symbols"]["*"] = {"axes": {}, "seconds": 0.11}
    data["shape"]["hidden_size"] = 64
    table = load(tmp_path, data)
    assert table.seconds(sizes_of_parent(SHAPE)) == pytest.approx(2 * 0.37 + 2 * 0.41 + 0.11 + 0.9)
    with pytest.raises(UserError, match="'\\*' has no axis hidden_size"):
        table.seconds(sizes_of_parent(replace(SHAPE, hidden_size=32)))


def change(*keys: str, to: Any) -> dict[str, Any]:
    """The document with one value replaced, or removed (``to=...``)."""
    data = document()
    at = data
    for key in keys[:-1]:
        at = at[key]
    if to is ...:
        del at[keys[-1]]
    else:
        at[keys[-1]] = to
    return data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (change("symbols", "M", "seconds", to=[[0.1, 0.2], [0.1, 0.2]]), "symbols.M: seconds must be nested"),
        (change("symbols", "M", "seconds", to=[0.1, 0.2, 0.3]), "symbols.M: seconds must be nested"),
        (change("symbols", "*", "seconds", to=[0.1, -1]), "-1 is no time"),
        (change("symbols", "*", "seconds", to=[0.1, "fast"]), "damaged"),
        (change("symbols", "*", "axes", to={"hidden_size": [64, 32]}), "must ascend"),
        (change("symbols", "*", "axes", to={"width": [32, 64]}), "unknown axis 'width'"),
        (change("symbols", "*", "axes", to=...), "damaged"),
        (change("ends", to=...), "damaged"),
        (change("format_version", to=2), "another format or unit"),
        (change("unit", to="ms"), "another format or unit"),
        ([], "damaged"),
    ],
)  # fmt: skip
def test_damaged_tables_are_refused(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, data)
    assert "profile_latency.py" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        LatencyTable.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="no valid JSON"):
        LatencyTable.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (replace(SHAPE, hybrid_layer_pattern="ME-", ffn_hidden_size=64), "no '-' layers"),
        (
            replace(SHAPE, mamba_head_dim=8),
            "'M' has no axis mamba_head_dim, so it holds for mamba_head_dim=16",
        ),
        (replace(SHAPE, moe_ffn_hidden_size=16), "'E' has no axis moe_ffn_hidden_size"),
    ],
)
def test_models_that_were_not_measured_are_refused(
    table: LatencyTable, shape: ParentShape, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        table.seconds(sizes_of_parent(shape))


def test_another_parent_is_refused(tmp_path: Path) -> None:
    table = load(tmp_path, change("shape", "kv_channels", to=32))
    with pytest.raises(UserError, match="kv_channels=32, this one has 16"):
        table.seconds(sizes_of_parent(SHAPE))


def test_an_elastic_axis_that_was_not_measured_is_refused(table: LatencyTable) -> None:
    space = ElasticSpace.build(SHAPE, {"moe_ffn_hidden_size": [16, 32]})
    mix = SubmodelMix.one_hot(space, space.full())
    with pytest.raises(UserError, match="'E' has no axis moe_ffn_hidden_size"):
        table.seconds(mix.sizes())
