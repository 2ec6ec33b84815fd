"""The model card's numbers are the cost model's, and the documented file is the one that is written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.nested import nested_manifest
from elastic_megatron.conversion.card import model_card
from elastic_megatron.cost import Cost, account, metric, sizes_of_spec
from elastic_megatron.space import BLOCKS, Budget, ElasticSpace, ParentShape, SubmodelSpec, TensorLayout, ends

SHAPE = ParentShape(
    "MEM*E-M", 64, 9000, ffn_hidden_size=96, moe_ffn_hidden_size=48, moe_shared_expert_intermediate_size=40,
    num_moe_experts=16, moe_router_topk=3, mamba_num_heads=8, mamba_head_dim=12, mamba_state_dim=16,
    mamba_num_groups=2, num_attention_heads=8, num_query_groups=2, kv_channels=16, max_position_embeddings=100_000,
)  # fmt: skip
SPACE = ElasticSpace.build(
    SHAPE,
    {"hidden_size": [48, 20], "num_layers": [5], "num_moe_experts": [8, 4], "moe_ffn_hidden_size": [24, 12]},
    {"num_moe_experts": 4},
    per_layer=["num_moe_experts", "moe_ffn_hidden_size"],
    layer_order=[3, 1, 6, 4, 0, 2, 5],
)
SUBMODELS = {
    name: SubmodelSpec.of(SPACE.full().to_dict() | widths)
    for name, widths in {
        "large": {},
        "mid|dle": {"hidden_size": 48, "num_moe_experts": 8, "moe_ffn_hidden_size": 24},
        "tiny": {"hidden_size": 20, "num_layers": 5, "num_moe_experts": 4, "moe_ffn_hidden_size": 12},
        "uneven": {"hidden_size": 20, "num_moe_experts": [8, 4], "moe_ffn_hidden_size": [12, 24]},
    }.items()
}
BUDGETS = (
    Budget("large", "active_params", 1.0),
    Budget("mid|dle", "memory_bytes", 7.5e6, "absolute", batch_size=3),
    Budget("tiny", "active_params", 0.3),
    Budget("uneven", "latency", 0.001, "absolute", table="no/such/file"),
)
FAMILY = Manifest(shape=SHAPE, space=SPACE, submodels=SUBMODELS, budgets=BUDGETS)
PLAIN = Manifest(shape=SHAPE)
NUMBERS = ("parameters", "active", "BF16 weights (GiB)", "FP8 weights (GiB)", "NVFP4 weights (GiB)",
           "cache of a sequence (MiB)")  # fmt: skip


def _card(manifest: Manifest, submodel: str | None = None, elastic: bool = False, **options: Any) -> str:
    options = {"title": "A title", "dtype": torch.bfloat16} | options
    return model_card(manifest, submodel=submodel, elastic=elastic, **options)


def _table(card: str) -> dict[str, dict[str, str]]:
    """The card's table: first column → heading → cell."""
    lines = [line for line in card.splitlines() if line.startswith("|")]
    rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines
    ]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def _same(cells: list[str], cost: Cost) -> None:
    exact = [cost.total_params, cost.active_params]
    assert cells[:2] == [f"{n:,}" for n in exact]
    rounded = [cost.weights_bytes[f] / 2**30 for f in ("bf16", "fp8", "nvfp4")]
    rounded += [cost.cache_bytes_per_sequence / 2**20]
    assert [float(c.replace(",", "")) for c in cells[2:]] == pytest.approx(rounded, rel=6e-3)


def _metadata(card: str) -> dict[str, Any]:
    empty, text, rest = card.split("---\n", 2)
    assert empty == "" and rest.startswith("\n# A title\n")
    return yaml.safe_load(text)


def test_the_family_table_has_every_submodel_with_the_numbers_of_the_cost_model() -> None:
    table = _table(_card(FAMILY, elastic=True))
    assert list(table) == list(SUBMODELS)
    for name, spec in SUBMODELS.items():
        _same([table[name][h] for h in NUMBERS], account(SPACE, spec, 8192))


def test_the_largest_size_is_in_the_table_also_where_no_submodel_is_it() -> None:
    family = replace(FAMILY, submodels={"tiny": SUBMODELS["tiny"]})
    table = _table(_card(family, elastic=True))
    assert list(table) == ["whole", "tiny"]
    _same([table["whole"][h] for h in NUMBERS], account(SHAPE, context_length=8192))


def test_budgets_are_shown_as_asked_and_as_realised() -> None:
    table = _table(_card(FAMILY, elastic=True))
    found = {n: (row["budget asked"], row["budget realised"]) for n, row in table.items()}
    active = [account(SPACE, SUBMODELS[n]).active_params for n in ("tiny", "large")]
    memory = metric(sizes_of_spec(SPACE, SUBMODELS["mid|dle"]), BUDGETS[1])
    assert found == {
        "large": ("100.0 % active parameters", "100.0 %"),
        "mid|dle": ("0.00698 GiB memory", f"{memory / 2**30:.3g} GiB"),
        "tiny": ("30.0 % active parameters", f"{100 * active[0] / active[1]:.1f} %"),
        "uneven": ("1 ms latency", ""),
    }


def test_a_submodel_stands_beside_what_it_was_cut_from() -> None:
    card = _card(FAMILY, "tiny")
    table = _table(card)
    columns = {"tiny": SUBMODELS["tiny"], "the model it was cut from": SPACE.full()}
    for heading, spec in columns.items():
        _same([table[n][heading] for n in NUMBERS], account(SPACE, spec, 8192))
        for axis in SPACE.axes:
            assert table[f"`{axis}`"][heading] == str(spec[axis])
    share = _table(_card(FAMILY, elastic=True))["tiny"]["budget realised"]
    assert f"Its budget was 30.0 % active parameters; it has {share}." in card
    assert "5 layers (2 Mamba-2, 2 MoE, 1 attention)" in card


def test_a_plain_model_has_a_short_card_with_its_own_numbers() -> None:
    for manifest in (PLAIN, FAMILY):
        card = _card(manifest)
        _same([_table(card)["this model"][h] for h in NUMBERS], account(SHAPE, context_length=8192))
        assert "slice" not in card and "elastic_config" not in card and "budget" not in card


@pytest.mark.parametrize("pattern", ["M", "*-", "ME", "E", "M*E-"])
@pytest.mark.parametrize("elastic", [False, True])
def test_cards_of_models_without_some_parts(pattern: str, elastic: bool) -> None:
    shape = SHAPE.override(hybrid_layer_pattern=pattern, max_position_embeddings=512)
    space = ElasticSpace.build(shape, {"hidden_size": [48]})
    manifest = Manifest(shape=shape, space=space, submodels={"half": space.smallest()})
    card = _card(manifest, elastic=elastic)
    assert set(_metadata(card)["tags"]) == {
        "nemotron_h", *(["mamba2"] * ("M" in pattern)), *(["moe"] * ("E" in pattern)), *(["elastic"] * elastic),
    }  # fmt: skip
    row = _table(card)["whole" if elastic else "this model"]
    _same([row[h] for h in NUMBERS], account(shape, context_length=512))
    assert "at 512 tokens" in card


@pytest.mark.parametrize("submodel", [None, "mid|dle"])
@pytest.mark.parametrize("elastic", [False, True])
def test_the_metadata_is_yaml_and_claims_nothing_that_is_not_known(
    submodel: str | None, elastic: bool
) -> None:
    manifest = nested_manifest(FAMILY, submodel) if elastic and submodel else FAMILY
    found = _metadata(_card(manifest, submodel, elastic))
    assert found.keys() == {"library_name", "pipeline_tag", "tags"}
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "text-generation")


def test_a_family_inside_a_submodel_says_whose_it_is() -> None:
    inner = nested_manifest(FAMILY, "mid|dle")
    card = _card(inner, "mid|dle", elastic=True)
    table = _table(card)
    assert "`mid|dle`, itself a submodel of a larger family" in card and list(table) == list(inner.submodels)
    _same([table["tiny"][h] for h in NUMBERS], account(SPACE, SUBMODELS["tiny"], 8192))


def test_only_a_family_whose_sizes_are_part_of_each_other_is_called_nested() -> None:
    assert "holds 4 nested sizes" in _card(FAMILY, elastic=True)
    wide = SubmodelSpec.of(SUBMODELS["tiny"].to_dict() | {"num_moe_experts": 16})
    card = _card(replace(FAMILY, submodels=SUBMODELS | {"tiny": wide}), elastic=True)
    assert "holds 4 sizes." in card
    assert (
        "Every size is part of the largest one. tiny is not part of mid|dle: it has more (num_moe_experts 16, not 8)"
        in card
    )


def test_slicing_is_shown_with_the_smallest_name() -> None:
    assert "    elastic-megatron slice DIR DST --submodel tiny\n" in _card(FAMILY, elastic=True)
    assert " slice " not in _card(replace(FAMILY, submodels={}), elastic=True)


@pytest.mark.parametrize(
    ("widths", "dtype", "eager"),
    [
        ({}, torch.bfloat16, False),
        ({"hidden_size": 20}, torch.bfloat16, True),
        ({"hidden_size": 20}, torch.float32, False),
        ({"moe_ffn_hidden_size": 12}, torch.bfloat16, True),
        ({"moe_ffn_hidden_size": 12}, torch.float32, False),
        ({"hidden_size": 20, "num_layers": 1}, torch.bfloat16, False),  # an attention layer alone
    ],
)
def test_eager_experts_are_asked_for_where_rows_are_not_aligned(
    widths: dict[str, int], dtype: torch.dtype, eager: bool
) -> None:
    space = replace(
        SPACE, choices=(("num_layers", (7, 1)), *(c for c in SPACE.choices if c[0] != "num_layers"))
    )
    spec = SubmodelSpec.of(SPACE.full().to_dict() | widths)
    card = _card(replace(FAMILY, space=space, submodels={"s": spec}), "s", dtype=dtype)
    assert ('dtype="auto", experts_implementation="eager")' in card) is eager
    assert ("is not a multiple of 8" in card) is eager


def test_a_family_loads_as_its_largest_size_and_names_those_that_need_eager_experts() -> None:
    order = {name: SUBMODELS[name] for name in ("tiny", "uneven", "large", "mid|dle")}
    card = _card(replace(FAMILY, submodels=order), elastic=True)
    assert 'from_pretrained("DIR", dtype="auto")' in card
    assert "This concerns `tiny`." in card
    assert "Layers of `uneven` differ in width." in card


def test_a_submodel_of_uneven_layers_is_served_but_not_loaded() -> None:
    card = _card(FAMILY, "uneven")
    assert "vllm serve DIR --trust-remote-code" in card and "from_pretrained" not in card
    assert "| `num_moe_experts` | 8, 4 | 16 |" in card
    assert "--trust-remote-code" not in _card(FAMILY, "tiny")


def test_widths_of_left_out_layers_are_not_shown() -> None:
    choices = dict(SPACE.choices) | {"num_layers": (7, 3)}
    space = replace(SPACE, choices=tuple(choices.items()))
    spec = SubmodelSpec.of(SUBMODELS["uneven"].to_dict() | {"num_layers": 3})
    card = _card(replace(FAMILY, space=space, submodels={"s": spec}), "s")
    assert "3 layers (1 Mamba-2, 1 MoE, 1 attention)" in card
    assert "| `num_moe_experts` | 8 | 16 |" in card and "| `moe_ffn_hidden_size` | 12 | 48 |" in card


DOCUMENT = (Path(__file__).parents[2] / "docs" / "elastic_config.md").read_text()


def _section(title: str) -> str:
    level = title.split(" ")[0]
    return re.split(rf"^#{{1,{len(level)}}} ", DOCUMENT.split(f"\n{title}\n")[1], flags=re.M)[0]


def _fields(title: str) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", re.split(r"^### ", _section(title), flags=re.M)[0], flags=re.M)


def test_every_field_of_the_file_is_documented_and_no_other() -> None:
    written = FAMILY.to_dict()
    assert written["space"] is not None
    assert _fields("## Fields") == list(written)
    assert _fields("### `shape`") == list(written["shape"])
    assert _fields("### `space`") == list(written["space"])
    for budget in written["budgets"]:
        assert _fields("### `budgets`") == list(budget)


def test_the_documented_example_is_a_manifest() -> None:
    example = json.loads(DOCUMENT.split("```json\n")[1].split("```")[0])
    manifest = Manifest.from_dict(example)
    assert manifest.to_dict() == example
    assert example.keys() == FAMILY.to_dict().keys()
    assert manifest.space is not None and manifest.space.kept("num_moe_experts", 2) == [0, 2]


def test_the_documented_way_to_cut_is_the_one_that_is_used() -> None:
    names: dict[str, Any] = {}
    exec(DOCUMENT.split("```python\n")[1].split("```")[0], names)
    stored = json.loads(json.dumps(FAMILY.to_dict()))["space"]
    for axis, widths in stored["choices"].items():
        for width in widths:
            found = names["kept"](SHAPE.size(axis), stored["lanes"][axis], width)
            assert found == SPACE.kept(axis, width)
    for spec in SUBMODELS.values():
        depth = spec["num_layers"]
        assert names["kept_layers"](stored["layer_order"], depth) == list(SPACE.kept_layers(spec))


def _tensors_of_axis(axis: str, dim: int) -> set[str]:
    """Hugging Face names of the tensors that the axis indexes along a dimension, by the fact table."""
    layouts: list[TensorLayout] = [*(t for block in BLOCKS.values() for t in block), *ends(False)]
    found = set()
    for layout in layouts:
        segments = layout.dims[dim] if dim < len(layout.dims) else ()
        parts = {s.hf for s in layout.dims[0]} if layout.hf is None else {layout.hf}
        owners = {s.hf for s in segments if axis in s.factors} if layout.hf is None and dim == 0 else parts
        if any(axis in s.factors for s in segments):
            found |= {str(name).replace("{e}", "E") for name in owners}
    return found


def test_the_documented_tensors_of_each_axis_are_those_of_the_fact_table() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \|(.*)\|(.*)\|$", _section("## To cut a submodel without elastic_megatron"), re.M
    )
    found = {axis: [set(re.findall(r"`([^`]+)`", cell)) for cell in cells] for axis, *cells in rows}
    assert found == {
        axis: [_tensors_of_axis(axis, 0), _tensors_of_axis(axis, 1)]
        for axis in (
            "hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
            "num_moe_experts", "mamba_num_heads", "mamba_head_dim", "mamba_state_dim", "num_attention_heads",
        )
    }  # fmt: skip
    layouts = {t.hf: t for t in BLOCKS["M"]}
    for name in ("mixer.in_proj.weight", "mixer.conv1d.weight"):
        assert ", ".join(s.label for s in layouts[name].dims[0]) in DOCUMENT.replace("\n", " ")
