"""What tests of ``plan`` share: a small recipe, and the command's answer."""

import argparse
import json
from pathlib import Path
from typing import Any

from elastic_megatron.commands import plan
from elastic_megatron.recipe import load
from elastic_megatron.space import ParentShape

RECIPES = Path(__file__).parents[2] / "recipes"
NANO = RECIPES / "nemotron3_nano_30b" / "plan.yaml"
CHAIN_OF_NANO = RECIPES / "nemotron3_nano_30b" / "chain.yaml"
V2 = RECIPES / "nemotron_nano_v2_12b" / "plan.yaml"
SMALL = """\
name: small
run_dir: run
model:
  sizes: {hybrid_layer_pattern: ME*, hidden_size: 64, vocab_size: 128, mamba_num_heads: 8, mamba_head_dim: 16,
    mamba_state_dim: 16, mamba_num_groups: 2, num_attention_heads: 4, num_query_groups: 2, kv_channels: 16,
    num_moe_experts: 8, moe_router_topk: 2, moe_ffn_hidden_size: 32, moe_shared_expert_intermediate_size: 32}
space:
  choices: {hidden_size: [32, 64], num_moe_experts: [4, 8]}
  lanes: {num_moe_experts: 2}
budgets:
  full: {metric: total_params, target: 1.0}
"""


def parse(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    return parser.parse_args(["plan", *map(str, arguments)])


def planned(*arguments: object) -> dict[str, Any]:
    args = parse(*arguments, "--json")
    result = args.handler(args)
    return json.loads(json.dumps(result))


def shape_of(recipe: Path) -> ParentShape:
    sizes = load(recipe).model.sizes
    assert sizes is not None
    return ParentShape.from_dict(sizes.model_dump())


def write_config(folder: Path, shape: ParentShape) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "nemotron_h", **shape.to_hf()}))
    return folder
