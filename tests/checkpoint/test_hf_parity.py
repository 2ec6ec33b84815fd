"""Law 1, exported: transformers' own model on a sliced directory computes what the masked parent computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import slice_hf, write_hf
from hf_models import same, stored
from parity import PARENT, TOLERANCE, distance, load, megatron_logits, randomise

from elastic_megatron import runtime
from elastic_megatron.blocks import build_elastic_model, build_model, running
from elastic_megatron.checkpoint.hf_read import read_config, read_hf
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.data.tokenizer import byte_tokenizer, load_tokenizer
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.ops.locate import weights
from elastic_megatron.space import ElasticSpace, SubmodelSpec

transformers = pytest.importorskip("transformers")

CHOICES = {
    "hidden_size": [23], "num_layers": [4], "ffn_hidden_size": [50], "moe_ffn_hidden_size": [24],
    "moe_shared_expert_intermediate_size": [31], "num_moe_experts": [4], "mamba_num_heads": [2],
    "mamba_head_dim": [5], "mamba_state_dim": [9], "num_attention_heads": [2],
}  # fmt: skip
SPACE = ElasticSpace.build(PARENT, CHOICES, {"num_moe_experts": 4}, layer_order=[3, 1, 0, 4, 6, 2, 5])
SUBMODELS = {
    a: SubmodelSpec.of({**SPACE.full().to_dict(), a: widths[0]}) for a, widths in CHOICES.items()
} | {"all": SPACE.smallest(), "parent": SPACE.full()}


@pytest.fixture(scope="module")
def masked() -> Any:
    runtime.start(seed=1)
    model = build_elastic_model(SPACE, dtype=torch.float64)
    randomise(model)
    return model


@pytest.fixture(scope="module")
def family(masked: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("family")
    byte_tokenizer().save_pretrained(root / "tokenizer")
    write_hf(
        root / "elastic",
        Manifest(shape=PARENT, space=SPACE, submodels=SUBMODELS),
        weights(masked.state_dict()).items(),
        elastic=True,
        dtype=torch.float32,
        side_files=root / "tokenizer",
    )
    slice_hf(root / "elastic", root / "slices", list(SUBMODELS))
    return root


@pytest.mark.parametrize("name", SUBMODELS)
def test_exported_is_masked(masked: Any, family: Path, name: str) -> None:
    # transformers' grouped GEMM needs rows of 16 bytes; 23 hidden channels have none
    odd = {"experts_implementation": "eager"} if SUBMODELS[name]["hidden_size"] == 23 else {}
    exported, complaints = load(family / "slices" / name, **odd)
    assert not complaints
    for batch, length in ((1, 37), (3, 19)):  # both longer than a chunk of the scan
        tokens = torch.randint(0, 264, (batch, length), generator=torch.Generator().manual_seed(length))
        with running(masked, SubmodelMix.one_hot(SPACE, SUBMODELS[name], dtype=torch.float64)):
            wanted = megatron_logits(masked, tokens)
        with torch.no_grad():
            assert distance(exported(tokens, use_cache=False).logits, wanted) < TOLERANCE


def test_the_elastic_directory_loads_as_the_parent(family: Path) -> None:
    assert same(stored(family / "elastic"), stored(family / "slices/parent"))
    assert not load(family / "elastic")[1]


def test_a_slice_generates_what_the_masked_parent_would(masked: Any, family: Path) -> None:
    name = "mamba_num_heads"
    tokenizer = load_tokenizer(family / "slices" / name)
    exported, _ = load(family / "slices" / name)
    prompt = tokenizer("Nested models", return_tensors="pt")["input_ids"]
    answer = exported.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8,
                               do_sample=False)  # fmt: skip
    tokens = prompt
    with running(masked, SubmodelMix.one_hot(SPACE, SUBMODELS[name], dtype=torch.float64)):
        for _ in range(8):
            tokens = torch.cat([tokens, megatron_logits(masked, tokens)[:, -1:].argmax(-1)], dim=1)
    assert answer.tolist() == tokens.tolist()
    assert isinstance(tokenizer.decode(answer[0]), str)


@pytest.mark.parametrize("tied", [False, True])
def test_models_without_shared_experts_and_with_tied_ends(tmp_path: Path, tied: bool) -> None:
    runtime.start(seed=1)
    shape = PARENT.override(
        hybrid_layer_pattern="ME*",
        moe_shared_expert_intermediate_size=0,
        ffn_hidden_size=0,
        tie_embeddings=tied,
    )
    model = build_model(shape, dtype=torch.float64)
    randomise(model)
    write_hf(tmp_path / "m", Manifest(shape=shape), weights(model.state_dict()).items(), dtype=torch.float32)
    exported, complaints = load(tmp_path / "m")
    assert all("shared_experts" in name for names in complaints.values() for name in names)
    tokens = torch.randint(0, 264, (2, 21), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert distance(exported(tokens, use_cache=False).logits, megatron_logits(model, tokens)) < TOLERANCE
    assert read_hf(tmp_path / "m").manifest.shape == shape


def test_a_directory_saved_by_transformers_is_imported_and_written_again(tmp_path: Path) -> None:
    runtime.start(seed=1)
    config = transformers.NemotronHConfig(**PARENT.to_hf(), time_step_min=1e-30)
    torch.manual_seed(2)
    original = transformers.NemotronHForCausalLM(config).eval()
    original.save_pretrained(tmp_path / "hub")
    opened = read_hf(tmp_path / "hub")
    assert opened.manifest.shape == PARENT
    model = build_model(PARENT, dtype=torch.float64)
    assert not model.load_state_dict(dict(opened.state()), strict=False).unexpected_keys
    tokens = torch.randint(0, 264, (2, 21))
    with torch.no_grad():
        assert distance(original(tokens, use_cache=False).logits, megatron_logits(model, tokens)) < TOLERANCE
    write_hf(tmp_path / "again", opened.manifest, weights(model.state_dict()).items(), dtype=torch.float32)
    assert same(stored(tmp_path / "again"), stored(tmp_path / "hub"))
    before, again = (read_config(tmp_path / name) for name in ("hub", "again"))
    # what transformers writes of infinity is no number to other readers, and no layer predicts further tokens
    assert before.pop("mtp_layers_block_type") and not before["num_nextn_predict_layers"]
    assert before["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    before["time_step_limit"] = [0.0, torch.finfo(torch.float32).max]
    assert {k: v for k, v in again.items() if k in before} == before
    assert set(again) - set(before) == {"hybrid_override_pattern", "num_hidden_layers", "mamba_n_groups"}


def test_a_model_of_that_config_can_be_initialised_at_random(family: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(family / "slices/all")
    state = transformers.AutoModelForCausalLM.from_config(config).state_dict()
    assert all(torch.isfinite(t).all() for t in state.values())
