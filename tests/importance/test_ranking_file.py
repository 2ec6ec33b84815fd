"""A ranking survives its files, and damaged files are told from good ones."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from importance_models import CHOICES, PARENT, random_ranking
from safetensors.torch import load_file, save_file

from elastic_megatron.errors import UserError
from elastic_megatron.importance import UNSEEN, Ranking, order_of


@pytest.fixture
def ranking() -> Ranking:
    drawn = random_ranking(PARENT, tuple(CHOICES))
    tokens = {i: torch.arange(PARENT.num_moe_experts) for i in PARENT.layers_of("E")}
    drawn.scores["layers.1.num_moe_experts"][0] = UNSEEN
    drawn.scores["layers.1.moe_ffn_hidden_size"][0] = 0
    drawn.scores["layers.1.moe_ffn_hidden_size"][2, 5] = 0
    return dataclasses.replace(
        drawn, tokens=tokens, token_count=640, data_digest="d" * 64, versions={"torch": "2"}
    )


def test_round_trip(ranking, tmp_path):
    ranking.save(tmp_path)
    again = Ranking.load(tmp_path)
    assert again.digest() == ranking.digest() and again.unseen() == ranking.unseen()
    for ours, theirs in ((ranking.scores, again.scores), (ranking.orders, again.orders)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert (again.layer_types, again.token_count) == (PARENT.hybrid_layer_pattern, 640)
    assert (again.data_digest, again.versions) == ("d" * 64, {"torch": "2"})


def test_file_layout(ranking, tmp_path):
    ranking.save(tmp_path)
    tensors, notes = (
        load_file(tmp_path / "ranking.safetensors"),
        json.loads((tmp_path / "ranking.json").read_text()),
    )
    assert {"hidden_size.score", "hidden_size.order", "num_layers.score", "num_layers.order"} < set(tensors)
    assert {f"layers.1.num_moe_experts.{x}" for x in ("score", "order", "tokens")} < set(tensors)
    assert tensors["layers.1.moe_ffn_hidden_size.order"].shape == (8, 24)
    assert notes["layer_types"] == PARENT.hybrid_layer_pattern and notes["tokens"] == 640
    assert notes["unseen"] == {
        "layers.1.num_moe_experts": [0],
        "layers.4.num_moe_experts": [0],
        "layers.1.moe_ffn_hidden_size": {"2": [5]},
    }


@pytest.mark.parametrize(
    "damage", ["no tensors", "no notes", "cut", "not json", "no key", "changed", "foreign"]
)
def test_damaged_files_are_user_errors(ranking, tmp_path, damage):
    ranking.save(tmp_path)
    tensors, notes = tmp_path / "ranking.safetensors", tmp_path / "ranking.json"
    if damage == "no tensors":
        tensors.unlink()
    elif damage == "no notes":
        notes.unlink()
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif damage == "not json":
        notes.write_text(notes.read_text()[:-9])
    elif damage == "no key":
        notes.write_text("{}")
    else:
        held = load_file(tensors)
        if damage == "changed":
            held["hidden_size.score"][3] += 1
        else:
            held["stranger"] = torch.zeros(1)
        save_file(held, tensors)
    with pytest.raises(UserError) as error:
        Ranking.load(tmp_path)
    assert "\n" not in str(error.value) and "rank` again" in str(error.value)


def test_ties_are_ordered_by_index_and_groups_stay_together():
    score = torch.tensor([1.0, 2.0, 2.0, 0.0, UNSEEN, 5.0, UNSEEN, 5.0])
    assert order_of(score).tolist() == [5, 7, 1, 2, 0, 3, 4, 6]
    assert order_of(score, groups=2).tolist() == [1, 2, 0, 3, 5, 7, 4, 6]
    assert order_of(score.view(2, 4)).tolist() == [[1, 2, 0, 3], [1, 3, 0, 2]]
