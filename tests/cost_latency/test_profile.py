"""Profiles: real layers are timed at every grid point, fairly, into a table that budgets can read."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_megatron.cost import sizes_of_parent
from elastic_megatron.cost.latency import LatencyTable
from elastic_megatron.space import ParentShape

TOOL = Path(__file__).parents[2] / "tools" / "profile_latency.py"
SHAPE = ParentShape(
    "ME*-", hidden_size=32, vocab_size=64, ffn_hidden_size=32, moe_ffn_hidden_size=16,
    moe_shared_expert_intermediate_size=16, num_moe_experts=4, moe_router_topk=2, mamba_num_heads=4,
    mamba_head_dim=8, mamba_state_dim=8, mamba_num_groups=2, mamba_chunk_size=8, num_attention_heads=4,
    num_query_groups=2, kv_channels=8,
)  # fmt: skip
CHOICES = {"hidden_size": [32, 16], "num_moe_experts": [4, 2], "num_layers": [4, 3]}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_profile_is_a_table(megatron: Any, tmp_path: Path, backward: bool, tied: bool) -> None:
    from elastic_megatron.blocks.profile import profile_layers

    shape = SHAPE.override(tie_embeddings=tied)
    data = profile_layers(shape, CHOICES, tokens=16, batch=2, repeats=1, backward=backward)
    assert {s: list(g["axes"]) for s, g in data["symbols"].items()} == {
        "M": ["hidden_size"], "*": ["hidden_size"], "-": ["hidden_size"],
        "E": ["hidden_size", "num_moe_experts"],
    }  # fmt: skip
    (tmp_path / "table.json").write_text(json.dumps(data))
    table = LatencyTable.load(tmp_path / "table.json")
    e = data["symbols"]["E"]["seconds"]
    assert dict(table.symbols)["E"].at({"hidden_size": 16, "num_moe_experts": 4}) == e[0][1] > 0
    last = sum(g["seconds"][1] for s, g in data["symbols"].items() if s != "E") + e[1][1]
    assert table.seconds(sizes_of_parent(shape)) == pytest.approx(last + data["ends"]["seconds"][1])


def test_every_round_visits_every_point_and_the_median_counts(
    megatron: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from elastic_megatron.blocks import profile

    visits: list[tuple[str, int]] = []

    def timed(shape: ParentShape, name: str, widths: dict[str, int], *_: object) -> float:
        assert shape is SHAPE
        visits.append((name, sum(widths.values())))
        return [1.0, 100.0, 3.0][sum(v == visits[-1] for v in visits) - 1] + widths["hidden_size"]

    monkeypatch.setattr(profile, "_time", timed)
    data = profile.profile_layers(SHAPE, CHOICES, tokens=16, repeats=3)
    points = 2 + 3 * 2 + 2 * 2
    assert len(visits) == 3 * points and visits[:points] == visits[points : 2 * points]
    assert len(set(visits)) == points
    assert data["symbols"]["E"]["seconds"] == [[19.0, 19.0], [35.0, 35.0]]
    assert data["ends"]["seconds"] == [19.0, 35.0]


def test_timed_layers_have_the_asked_widths(megatron: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is one layer of the asked type and widths, with the whole vocabulary in the ends only."""
    from elastic_megatron.blocks import profile

    built: list[tuple[str, int, int | None, int]] = []
    build = profile.build_model

    def recorded(shape: ParentShape, **kwargs: Any) -> Any:
        built.append((shape.hybrid_layer_pattern, shape.hidden_size, shape.num_moe_experts, shape.vocab_size))
        return build(shape, **kwargs)

    monkeypatch.setattr(profile, "build_model", recorded)
    profile.profile_layers(SHAPE, CHOICES, tokens=16, repeats=1, dtype=torch.float64)
    assert {b for b in built if b[0] == "E"} == {("E", h, n, 8) for h in (16, 32) for n in (2, 4)}
    assert [b for b in built if b[3] == 64] == [("-", 16, 4, 64), ("-", 32, 4, 64)]


def test_the_tool_writes_the_table_of_a_recipe(megatron: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    sizes = {k: v for k, v in SHAPE.to_dict().items() if k in ("hybrid_layer_pattern", "hidden_size") or v}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"name": "r", "run_dir": "run", "model": {"dtype": "fp32", "sizes": sizes}}))

    def tool(*arguments: str) -> int:
        monkeypatch.setattr("sys.argv", ["profile_latency.py", str(recipe), *arguments])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(TOOL), run_name="__main__")
        assert isinstance(left.value.code, int)
        return left.value.code

    out = tmp_path / "sub" / "table.json"
    common = ["--out", str(out), "--tokens", "16", "--repeats", "1"]
    assert tool("space.choices={hidden_size: [16, 32]}", *common) == 0
    assert LatencyTable.load(out).tokens == 16
    assert tool(*common) == 2 and "no space.choices" in capsys.readouterr().err
    assert tool(*common, "--batch", "3") == 2 and "multiple of --batch 3" in capsys.readouterr().err
