"""Widths that differ between layers: ``block_configs`` and the weights are enough for a loader of such models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import write_hf
from parity import PARENT, TOLERANCE, distance, megatron_logits, randomise

from elastic_megatron import runtime
from elastic_megatron.blocks import build_elastic_model, running
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.ops.locate import weights
from elastic_megatron.space import ElasticSpace, SubmodelSpec

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")

AXES = {
    "num_moe_experts": [12, 4],
    "moe_ffn_hidden_size": [40, 16],
    "moe_shared_expert_intermediate_size": [24],
}


def test_layers_built_by_their_own_configs_compute_the_masked_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers has no such model, so its own blocks are built here as vLLM builds its: each from the config that the
    exported class gives for its layer."""
    runtime.start(seed=1)
    parent = PARENT.override(hybrid_layer_pattern="EM*EE-")
    choices = {**AXES, "hidden_size": [40], "ffn_hidden_size": [56]}
    space = ElasticSpace.build(
        parent, choices, {"num_moe_experts": 4, "moe_ffn_hidden_size": 8}, per_layer=list(AXES)
    )
    spec = SubmodelSpec.of({
        "hidden_size": 40, "ffn_hidden_size": 56, "num_moe_experts": [4, 16, 12],
        "moe_ffn_hidden_size": [48, 16, 40], "moe_shared_expert_intermediate_size": [64, 24, 24],
    })  # fmt: skip
    model = build_elastic_model(space, dtype=torch.float64)
    randomise(model)
    manifest = Manifest(shape=parent, space=space, submodels={"uneven": spec})
    state = weights(model.state_dict()).items()
    write_hf(tmp_path / "m", manifest, state, submodel="uneven", dtype=torch.float32, verify=True)

    config = transformers.AutoConfig.from_pretrained(tmp_path / "m", trust_remote_code=True)
    block = modeling.NemotronHBlock

    def own(config: Any, layer_idx: int) -> Any:
        return block(config.get_nemotron_h_config_for_layer(layer_idx), layer_idx)

    monkeypatch.setattr(modeling, "NemotronHBlock", own)
    config.model_type = "nemotron_h"  # by which transformers finds how to read the weights
    loaded, info = modeling.NemotronHForCausalLM.from_pretrained(
        tmp_path / "m", config=config, output_loading_info=True
    )
    assert not any(info.values()), info
    assert [len(layer.mixer.experts.up_proj) for layer in _moe(loaded)] == [4, 16, 12]
    tokens = torch.randint(0, 264, (2, 37), generator=torch.Generator().manual_seed(4))
    with running(model, SubmodelMix.one_hot(space, spec, dtype=torch.float64)):
        wanted = megatron_logits(model, tokens)
    with torch.no_grad():
        found = loaded.eval()(tokens, use_cache=False).logits
    assert distance(found, wanted) < TOLERANCE


def _moe(model: Any) -> list[Any]:
    return [layer for layer in model.model.layers if hasattr(layer.mixer, "experts")]
