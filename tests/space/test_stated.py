"""Files state numbers, names and orders; what no model has is refused with its key, and never counted with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from elastic_megatron.errors import UserError
from elastic_megatron.space import Budget, ElasticSpace, ParentShape, SubmodelSpec
from elastic_megatron.space.stated import checked_name

SHAPE = ParentShape(
    "ME*-", 16, 32, ffn_hidden_size=12, moe_ffn_hidden_size=12, num_moe_experts=4, moe_router_topk=2, mamba_num_heads=4,
    mamba_head_dim=4, mamba_state_dim=3, mamba_num_groups=2, num_attention_heads=4, num_query_groups=2, kv_channels=4,
)  # fmt: skip
CONFIG = {"model_type": "nemotron_h", **SHAPE.to_hf()}
NO_NUMBERS = (-1, 1 << 60, 1e12, 2.0, "16", True, False, "", [], [16], {}, float("nan"), float("inf"), 10**30)


@pytest.mark.parametrize("key", [k for k, v in CONFIG.items() if type(v) is int and k != "expand"])
def test_numbers_of_a_config_are_those_of_a_model(key: str) -> None:
    """Every whole number of it, replaced by a value of another kind or size, is refused by its own name.

    ``expand`` is read by nobody: the sizes say it.
    """
    assert ParentShape.from_hf(CONFIG) == SHAPE
    for value in NO_NUMBERS:
        with pytest.raises(UserError, match=rf"(^|\W){key}\W") as error:
            ParentShape.from_hf({**CONFIG, key: value})
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("field", ["layernorm_epsilon", "moe_router_topk_scaling_factor"])
def test_factors_are_finite_and_positive(field: str) -> None:
    for value in (0, -1.0, float("nan"), float("inf"), "1", True, None, [1.0]):
        with pytest.raises(UserError, match=field):
            SHAPE.override(**{field: value})


ODD_LAYERS: tuple[dict[str, Any], ...] = (
    {"hybrid_override_pattern": "M" * 10_000_000},
    {"hybrid_override_pattern": 5},
    {"hybrid_override_pattern": ["M"]},
    {"hybrid_override_pattern": "ME*-M"},
    {"hybrid_override_pattern": "ME*-", "num_hidden_layers": 5},
    {"layers_block_type": ["mamba"] * 100_000},
    {"layers_block_type": [["mamba"]]},
    {"layers_block_type": "mamba"},
    {"layers_block_type": 7},
    {"layers_block_type": ["x" * 10_000_000]},
    {"num_local_experts": 5},
    {"hybrid_override_pattern": "E" * 4000, "num_hidden_layers": 4000, "layers_block_type": None,
     "n_routed_experts": 50_000},
    {"tie_word_embeddings": "yes"},
    {"tie_word_embeddings": 1},
    {"mlp_hidden_act": ["relu2"]},
    {"mlp_hidden_act": "x" * 10_000_000},
)  # fmt: skip


@pytest.mark.parametrize("odd", range(len(ODD_LAYERS)))
def test_layers_and_options_of_a_config_are_those_of_a_model(odd: int) -> None:
    with pytest.raises(UserError) as error:
        ParentShape.from_hf({**CONFIG, **ODD_LAYERS[odd]})
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


SPACE = ElasticSpace.build(
    SHAPE, {"hidden_size": [8], "num_layers": [2], "ffn_hidden_size": [8, 4]}, {"ffn_hidden_size": 4}, layer_order=[3, 1, 0, 2]
)  # fmt: skip
Change = Callable[[dict[str, Any]], object]
ODD_SPACES: dict[str, Change] = {
    "no lanes": lambda d: d["lanes"].update(ffn_hidden_size=0),
    "negative lanes": lambda d: d["lanes"].update(ffn_hidden_size=-4),
    "lanes that do not divide": lambda d: d["lanes"].update(ffn_hidden_size=5),
    "lanes of a fraction": lambda d: d["lanes"].update(ffn_hidden_size=4.0),
    "lanes in words": lambda d: d["lanes"].update(ffn_hidden_size="4"),
    "lanes of no axis": lambda d: d["lanes"].update(nothing=1),
    "list of lanes": lambda d: d.update(lanes=[]),
    "short order": lambda d: d.update(layer_order=[0, 1, 2]),
    "order with a layer twice": lambda d: d.update(layer_order=[0, 1, 2, 2]),
    "order beyond": lambda d: d.update(layer_order=[0, 1, 2, 4]),
    "order of switches": lambda d: d.update(layer_order=[False, True, 2, 3]),
    "order of fractions": lambda d: d.update(layer_order=[0.0, 1, 2, 3]),
    "order in words": lambda d: d.update(layer_order="0123"),
    "width of a fraction": lambda d: d["choices"].update(hidden_size=[16, 8.0]),
    "width in words": lambda d: d["choices"].update(hidden_size=["8"]),
    "no width": lambda d: d["choices"].update(hidden_size=[16, 0]),
    "negative width": lambda d: d["choices"].update(hidden_size=[16, -8]),
    "wider than the model": lambda d: d["choices"].update(hidden_size=[32]),
    "number for widths": lambda d: d["choices"].update(hidden_size=8),
    "widths of no axis": lambda d: d["choices"].update(nothing=[8]),
    "layers of no axis": lambda d: d.update(per_layer=[["hidden_size"]]),
    "no parent": lambda d: d.update(parent=None),
    "odd parent": lambda d: d["parent"].update(hidden_size="16"),
}


@pytest.mark.parametrize("odd", ODD_SPACES)
def test_spaces_are_read_as_they_were_written_or_refused(odd: str) -> None:
    data = SPACE.to_dict()
    assert ElasticSpace.from_dict(data) == SPACE
    ODD_SPACES[odd](data)
    with pytest.raises(UserError):
        ElasticSpace.from_dict(data)


def test_widths_are_whole_numbers() -> None:
    spec = SPACE.smallest()
    assert SubmodelSpec.from_dict(spec.to_dict()) == spec
    for widths in (
        {"hidden_size": 8.0},
        {"hidden_size": True},
        {"hidden_size": [8.0]},
        {"hidden_size": "8"},
        {"x": 8},
        [],
        5,
    ):
        with pytest.raises(UserError):
            SubmodelSpec.from_dict(widths)  # pyright: ignore[reportArgumentType]


def test_budgets_are_finite_and_known() -> None:
    good = Budget("half", "active_params", 0.5).to_dict()
    assert Budget.from_dict(good).to_dict() == good
    for change in (
        {"target": float("nan")}, {"target": float("inf")}, {"target": 0}, {"target": -1}, {"target": "1"},
        {"target": None}, {"target": True}, {"metric": "x"}, {"metric": []}, {"unit": 3}, {"format": "fp7"},
        {"sequence_length": 0}, {"batch_size": 1.5}, {"table": 3}, {"table": "x.json"}, {"metric": "latency"},
        {"name": "../x"}, {"name": ""}, {"name": None}, {"more": 1},
    ):  # fmt: skip
        with pytest.raises(UserError):
            Budget.from_dict({**good, **change})
    with pytest.raises(UserError):
        Budget.from_dict([])  # pyright: ignore[reportArgumentType]


def test_names_cannot_lead_elsewhere() -> None:
    for name in ("6b", "half_v1.2-x", "hidden_size=48", "A" * 100):
        assert checked_name(name, "submodel") == name
    for name in (
        "",
        ".",
        "..",
        ".x",
        "-x",
        "a/b",
        "/a",
        "a\\b",
        "a\n",
        "\0",
        "A" * 101,
        "~x",
        None,
        3,
        ["a"],
    ):
        with pytest.raises(UserError, match="is no name of a submodel"):
            checked_name(name, "submodel")


def test_lanes_are_at_least_one_whoever_asks() -> None:
    for lanes in (0, -4):
        with pytest.raises(UserError, match="must be a multiple of"):
            ElasticSpace.build(SHAPE, {"ffn_hidden_size": [8]}, {"ffn_hidden_size": lanes})
