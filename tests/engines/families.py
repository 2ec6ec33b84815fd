"""Exported families of random weights, at shapes that engines take, and what transformers computes of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from hf_files import slice_hf, write_hf
from torch import Tensor

from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.stored import model_tensors
from elastic_megatron.data.tokenizer import byte_tokenizer
from elastic_megatron.space import ElasticSpace, ParentShape, SubmodelSpec

PROMPTS = [[2, 9, 40, 7, 101], [5], list(range(3, 70))]  # longer and shorter than a chunk of the scan
NEW = 8
# groups are not 8, heads are not a chunk, and no width is the default of any engine
MOE = ParentShape(
    "MEM*EME", 128, 264, max_position_embeddings=512, mamba_num_heads=8, mamba_head_dim=32, mamba_state_dim=16,
    mamba_num_groups=2, mamba_chunk_size=32, num_attention_heads=4, num_query_groups=2, kv_channels=32,
    num_moe_experts=8, moe_router_topk=2, moe_router_topk_scaling_factor=2.5, moe_ffn_hidden_size=48,
    moe_shared_expert_intermediate_size=64,
)  # fmt: skip
SHAPES = {
    "moe": MOE,
    "moe, tied": MOE.override(tie_embeddings=True),
    "moe, no shared experts": MOE.override(moe_shared_expert_intermediate_size=0),
    "dense": MOE.override(hybrid_layer_pattern="M-M*-M", ffn_hidden_size=80),
    "mamba and attention": MOE.override(hybrid_layer_pattern="M*M"),
}
CHOICES = {
    "hidden_size": [64, 96], "mamba_num_heads": [4, 6], "ffn_hidden_size": [48], "num_moe_experts": [4, 6],
    "moe_ffn_hidden_size": [32], "moe_shared_expert_intermediate_size": [48],
}  # fmt: skip


def directories(root: Path, shape: ParentShape) -> dict[str, Path]:
    """A family's elastic directory, and its smallest size cut out of it."""
    choices = {axis: widths for axis, widths in CHOICES.items() if shape.size(axis)}
    space = ElasticSpace.build(shape, choices)
    smallest = SubmodelSpec.of(space.full().to_dict() | {axis: min(w) for axis, w in choices.items()})
    family = Manifest(shape=shape, space=space, submodels={"large": space.full(), "small": smallest})
    byte_tokenizer().save_pretrained(root / "tokenizer")
    write_hf(root / "elastic", family, state_of(shape).items(), elastic=True, side_files=root / "tokenizer")
    slice_hf(root / "elastic", root / "slices", ["small"])
    return {"elastic directory": root / "elastic", "slice": root / "slices" / "small"}


def state_of(shape: ParentShape, seed: int = 5) -> dict[str, Tensor]:
    """Weights under which logits differ between tokens and no state explodes; norms and biases are random too."""
    generator, found = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for tensor in model_tensors(shape):
        normal, name = torch.randn(tensor.shape, generator=generator), tensor.name
        if name.endswith("A_log"):
            value = (15 * torch.rand(tensor.shape, generator=generator) + 1).log()
        elif name.endswith("dt_bias"):
            dt = 0.001 * 100 ** torch.rand(tensor.shape, generator=generator)
            value = dt + torch.log(-torch.expm1(-dt))
        elif len(tensor.shape) == 1:
            value = 0.2 * normal + (0 if name.endswith("bias") else 1)
        else:
            value = normal / math.sqrt(math.prod(tensor.shape[1:]))
        found[name] = 3 * value if name == "output_layer.weight" else value
    return found


def reference(directory: Path) -> dict[str, Any]:
    """What transformers computes in fp32: log-probabilities, greedy tokens and by how much each was the most probable."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    found: dict[str, Any] = {"log_p": [], "greedy": [], "margin": []}
    with torch.no_grad():
        for prompt in PROMPTS:
            found["log_p"].append(model(torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1))
            tokens, margins = list(prompt), []
            for _ in range(NEW):
                best = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
                tokens.append(int(best.indices[0]))
                margins.append(float(best.values[0] - best.values[1]))
            found["greedy"].append(tokens[len(prompt) :])
            found["margin"].append(min(margins))
    return found
