"""Megatron-Bridge, which shares no line with this project, converts Hugging Face directories as we do: bit for bit.

Nothing here installs it. To run these tests, put it where Python finds it, for example with ``uv pip install
--target DIR --no-deps megatron-bridge==0.6.2 omegaconf antlr4-python3-runtime==4.9.3`` and ``PYTHONPATH=DIR``.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from elastic_megatron.checkpoint.foreign import foreign_manifest
from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.checkpoint.named import foreign_folder
from elastic_megatron.checkpoint.torch_dist import open_torch_dist
from elastic_megatron.conversion import Request, to_hf
from elastic_megatron.space import ParentShape

_SIZES = {
    "hidden_size": 24, "vocab_size": 37, "moe_ffn_hidden_size": 10, "moe_shared_expert_intermediate_size": 6,
    "num_moe_experts": 7, "moe_router_topk": 3, "moe_router_topk_scaling_factor": 2.5, "mamba_num_heads": 6,
    "mamba_head_dim": 5, "mamba_state_dim": 3, "mamba_num_groups": 3, "num_attention_heads": 6,
    "num_query_groups": 2, "kv_channels": 4,
}  # fmt: skip
SHAPES = {
    "every_kind": ParentShape("MEM*E-M-", ffn_hidden_size=11, **_SIZES),
    "tied": ParentShape("E*M", tie_embeddings=True, **_SIZES),
}
# tensors of the two models, in Megatron and in files
COUNTS = {"every_kind": (77, 79), "tied": (33, 36)}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``NAME/hf``: what transformers saved, every value random; ``NAME/bridge``: what Bridge made of it."""
    if importlib.util.find_spec("megatron.bridge") is None:
        pytest.skip("megatron-bridge is not installed (pip install --no-deps megatron-bridge omegaconf)")
    root = tmp_path_factory.mktemp("bridge")
    paths = []
    for seed, (name, shape) in enumerate(SHAPES.items()):
        _write(root / name / "hf", shape, seed)
        paths += [str(root / name / "hf"), str(root / name / "bridge")]
    # models built in this process left the attention backend that they chose in the environment
    clean = {k: v for k, v in os.environ.items() if not k.startswith("NVTE_")}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("bridge_oracle.py")), *paths],
        capture_output=True, text=True, timeout=300, env=clean | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return root


def _write(directory: Path, shape: ParentShape, seed: int) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**shape.to_hf()))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):  # correction biases are buffers
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    if shape.tie_embeddings:
        model.lm_head.weight.data.copy_(
            model.get_input_embeddings().weight
        )  # nothing ties them for nemotron_h
    model.save_pretrained(directory)


def _differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    return [
        name
        for name in sorted(found.keys() | expected.keys())
        if name not in found
        or name not in expected
        or found[name].dtype != expected[name].dtype
        or not torch.equal(found[name], expected[name])
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_bridge_imports_the_tensors_that_we_read(converted: Path, name: str) -> None:
    ours = dict(read_hf(converted / name / "hf").state())
    assert len(ours) == COUNTS[name][0]
    assert not _differing(ours, load_file(converted / name / "bridge" / "imported.safetensors"))


@pytest.mark.parametrize("name", SHAPES)
def test_bridge_exports_the_files_that_it_imported(converted: Path, name: str) -> None:
    """So nothing that both of us leave out is lost."""
    files = load_file(converted / name / "hf" / "model.safetensors")
    assert len(files) == COUNTS[name][1]
    assert not _differing(files, load_file(converted / name / "bridge" / "exported.safetensors"))


@pytest.mark.parametrize("name", SHAPES)
def test_a_checkpoint_that_bridge_saved_is_read_with_a_config_and_without(converted: Path, name: str) -> None:
    ours = dict(read_hf(converted / name / "hf").state())
    folder = foreign_folder(converted / name / "bridge" / "checkpoint")
    assert folder is not None
    for config in (None, converted / name / "hf"):
        manifest = foreign_manifest(folder, config)
        assert manifest.shape == SHAPES[name]
        assert not _differing(dict(open_torch_dist(folder, manifest, None).state()), ours)


@pytest.mark.parametrize("name", SHAPES)
def test_such_a_checkpoint_is_exported_as_the_directory_that_it_came_from(
    converted: Path, tmp_path: Path, name: str
) -> None:
    folder = foreign_folder(converted / name / "bridge" / "checkpoint")
    assert folder is not None
    stored = open_torch_dist(folder, foreign_manifest(folder, converted / name / "hf"), None)
    to_hf(stored, [Request(tmp_path / "exported")])
    found = load_file(tmp_path / "exported" / "model.safetensors")
    assert not _differing(found, load_file(converted / name / "hf" / "model.safetensors"))
