"""Law 1, exported, for every mix of layers, in fp32 and in bf16, whole and cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_files import slice_hf, write_hf
from parity import PARENT, TOLERANCE, distance, load, megatron_logits, randomise

from elastic_megatron import runtime
from elastic_megatron.blocks import build_elastic_model, running
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.ops import SubmodelMix
from elastic_megatron.ops.locate import locate, weights
from elastic_megatron.space import ElasticSpace

# widths that transformers' grouped matrix product takes in bf16, other than in one test: multiples of 8
CHOICES = {
    "hidden_size": [40], "ffn_hidden_size": [32], "moe_ffn_hidden_size": [24],
    "moe_shared_expert_intermediate_size": [24], "num_moe_experts": [8], "mamba_num_heads": [4],
    "mamba_head_dim": [5], "mamba_state_dim": [7], "num_attention_heads": [4],
}  # fmt: skip
MIXES = ("M*", "M-*-", "ME*E", "*E-M", "EE*", "-M", "M")


@pytest.fixture(scope="module", params=MIXES)
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ElasticSpace, Path]:
    """A masked model in fp64 whose weights bf16 can hold, and it and its smallest submodel exported in both dtypes."""
    runtime.start(seed=1)
    parent = PARENT.override(hybrid_layer_pattern=request.param)
    choices = {a: widths for a, widths in CHOICES.items() if parent.size(a)}
    lanes = {"num_moe_experts": 4, "moe_ffn_hidden_size": 8} if "E" in request.param else {}
    space = ElasticSpace.build(parent, choices, lanes)
    model = build_elastic_model(space, dtype=torch.float64)
    randomise(model)
    with torch.no_grad():
        for name, tensor in weights(model.state_dict()).items():
            layout = locate(parent, name)[1]
            kept = layout.fp32 or layout.name == "mixer.dt_bias"
            tensor.copy_(tensor.to(torch.float32 if kept else torch.bfloat16))
    root = tmp_path_factory.mktemp("family")
    manifest = Manifest(shape=parent, space=space, submodels={"whole": space.full(), "cut": space.smallest()})
    for dtype in (torch.float32, torch.bfloat16):
        folder = root / str(dtype).removeprefix("torch.")
        write_hf(folder, manifest, weights(model.state_dict()).items(), elastic=True, dtype=dtype)
        slice_hf(folder, folder / "slices", list(manifest.submodels))
    return model, space, root


@pytest.mark.parametrize("name", ["whole", "cut"])
def test_transformers_computes_what_megatron_does(family: Any, name: str) -> None:
    """From the fp32 directory in fp32, and from the bf16 directory in fp32 the same; in bf16 up to its rounding."""
    model, space, root = family
    spec = space.full() if name == "whole" else space.smallest()
    tokens = torch.randint(0, 264, (2, 37), generator=torch.Generator().manual_seed(4))
    with running(model, SubmodelMix.one_hot(space, spec, dtype=torch.float64)):
        wanted = megatron_logits(model, tokens)
    for folder, dtype, bound in (
        ("float32", torch.float32, TOLERANCE),
        ("bfloat16", torch.float32, TOLERANCE),
        ("bfloat16", torch.bfloat16, 5e-2),
    ):
        exported, complaints = load(root / folder / "slices" / name, dtype=dtype)
        assert not complaints
        with torch.no_grad():
            found = exported(tokens, use_cache=False).logits
        assert distance(found, wanted) < bound, (folder, dtype)
