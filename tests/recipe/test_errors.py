"""Every kind of mistake is reported with its exact place, and all of them at once."""

from collections.abc import Callable
from typing import Any

import pytest

from elastic_megatron.errors import UserError
from elastic_megatron.recipe import load

Complaints = Callable[..., list[str]]
Write = Callable[[str, str], str]

SIZES = """\
hybrid_layer_pattern: ME*-
hidden_size: 8
vocab_size: 8
ffn_hidden_size: 8
moe_ffn_hidden_size: 8
num_moe_experts: 4
moe_router_topk: 2
mamba_num_heads: 4
mamba_head_dim: 2
mamba_state_dim: 2
mamba_num_groups: 2
num_attention_heads: 4
num_query_groups: 2
kv_channels: 2
"""
STAGE = "name: a, tokens: 100, seq_length: 10, global_batch_size: 4"
BUDGETS = """\
space: {choices: {hidden_size: [4, 8]}}
budgets:
  large: {metric: active_params, target: 1.0}
  small: {metric: active_params, target: 0.5}
"""

WRONG = {
    "unknown key, near": (
        "optimizer:\n  betass: 3",
        "r.yaml:5:3: optimizer: unknown key 'betass', did you mean 'betas'?",
    ),
    "unknown key at the top": ("modle: 3", "r.yaml:4:1: unknown key 'modle', did you mean 'model'?"),
    "unknown key of others": (
        "loss: {lr: 3}",
        "r.yaml:4:8: loss: unknown key 'lr'; 'lr' belongs to optimizer, router or stages",
    ),
    "unknown key of one other": (
        "optimizer:\n  keep_last: 3",
        "r.yaml:5:3: optimizer: unknown key 'keep_last'; 'keep_last' belongs to checkpoint",
    ),
    "near and of others": (
        "router: {samples: 3}",
        "r.yaml:4:10: router: unknown key 'samples', did you mean 'sampling'?; 'samples' belongs to quantize or rank",
    ),
    "unknown key, far": (
        "teacher: {xyz: 3}",
        "r.yaml:4:11: teacher: unknown key 'xyz'; known here: checkpoint",
    ),
    "unknown axis": (
        "space:\n  choices:\n    hiden_size: [3]",
        "r.yaml:6:5: space.choices: unknown key 'hiden_size', did you mean 'hidden_size'?",
    ),
    "unknown axis in a list": (
        "space: {per_layer: [moe_experts]}",
        "r.yaml:4:21: space.per_layer[0]: must be ",
    ),
    "wrong word": (
        "loss: {kind: forward}",
        "r.yaml:4:8: loss.kind: must be 'forward_kl', 'reverse_kl' or 'cross_entropy', got 'forward', did you mean 'forward_kl'?",
    ),
    "text for a number": ("seed: twelve", "r.yaml:4:1: seed: must be a whole number, got 'twelve'"),
    "quoted number": ("seed: '12'", "r.yaml:4:1: seed: must be a whole number, got '12'"),
    "switch for a number": ("seed: true", "r.yaml:4:1: seed: must be a whole number, got true"),
    "switch for a count": (
        "rank: {samples: true}",
        "r.yaml:4:8: rank.samples: must be a whole number, got true",
    ),
    "switch for a rate": ("optimizer: {lr: true}", "r.yaml:4:13: optimizer.lr: must be a number, got true"),
    "fraction for a count": ("seed: 1.5", "r.yaml:4:1: seed: must be a whole number, got 1.5"),
    "YAML 1.1 switch": (
        "parallel: {sequence: yes}",
        "r.yaml:4:12: parallel.sequence: must be true or false, got 'yes'",
    ),
    "out of range": ("rank: {samples: 0}", "r.yaml:4:8: rank.samples: must be greater than 0, got 0"),
    "not finite": ("optimizer: {lr: .inf}", "r.yaml:4:13: optimizer.lr: must be a finite number, got inf"),
    "not a number": ("optimizer: {lr: .nan}", "r.yaml:4:13: optimizer.lr: must be "),
    "scalar for a section": ("rank: 3", "r.yaml:4:1: rank: must be a mapping, got 3"),
    "empty section": (
        "rank:\n  # samples: 3",
        "r.yaml:4:1: rank: must be a mapping, but nothing follows the key; leave the key out",
    ),
    "mapping for a list": ("stages: {name: a}", "r.yaml:4:1: stages: must be a list, got a mapping"),
    "short list": (
        "optimizer: {betas: [0.9]}",
        "r.yaml:4:13: optimizer.betas: is too short: item 1 is missing",
    ),
    "not a path": ("teacher: {checkpoint: 3}", "r.yaml:4:11: teacher.checkpoint: must be a path, got 3"),
    "empty path": ("teacher: {checkpoint: ''}", "r.yaml:4:11: teacher.checkpoint: must be a path, got ''"),
    "missing key": (
        "stages:\n- {name: a, tokens: 3, seq_length: 1}",
        "r.yaml:5:3: stages[0]: required key 'global_batch_size' is missing",
    ),
    "key twice": (
        "rank:\n  samples: 3\n  samples: 4",
        "r.yaml:6:3: key 'samples' is given twice (first at r.yaml:5:3)",
    ),
    "beta of 1": ("optimizer: {betas: [0.9, 1.0]}", "r.yaml:4:26: optimizer.betas[1]: must be below 1"),
    "min_lr above lr": ("optimizer: {min_lr: 1}", "r.yaml:4:13: optimizer.min_lr: 1 is above lr = 0.0001"),
    "unsafe stage name": ("stages:\n- {name: a/b}", "r.yaml:5:4: stages[0].name: 'a/b' is not a name: "),
    "unsafe budget name": (
        "budgets:\n  a.b: {metric: total_params, target: 1}",
        "r.yaml:5:3: budgets.a.b: 'a.b' is not a name: ",
    ),
    "wrong metric": (
        "budgets:\n  small: {target: 1, metric: params}",
        "r.yaml:5:22: budgets.small.metric: must be one of 'active_params', 'total_params', 'memory_bytes', 'latency', got 'params'",
    ),
    "no metric": (
        "budgets:\n  small: {target: 1}",
        "r.yaml:5:3: budgets.small: required key 'metric' is missing",
    ),
    "budget is no mapping": ("budgets: {small: 3}", "r.yaml:4:11: budgets.small: must be a mapping, got 3"),
    "key of another metric": (
        "budgets:\n  small: {metric: total_params, target: 1, batch_size: 3}",
        "r.yaml:5:44: budgets.small: unknown key 'batch_size'; 'batch_size' belongs to metric: memory_bytes",
    ),
    "memory without length": (
        "budgets:\n  small: {metric: memory_bytes, target: 1}",
        "r.yaml:5:3: budgets.small: required key 'sequence_length' is missing",
    ),
    "ratio above 1": (
        "budgets:\n  small: {metric: total_params, target: 2e9}",
        "r.yaml:5:33: budgets.small.target: 2e+09 is more than the whole parent (1); for a size write unit: absolute",
    ),
    "budgets without choices": (
        "budgets: {small: {metric: total_params, target: 0.5}}",
        "r.yaml:4:1: budgets: needs sizes to choose from: fill in space.choices",
    ),
    "size twice": (
        "space: {choices: {hidden_size: [8, 4, 8]}}",
        "r.yaml:4:19: space.choices.hidden_size: names 8 more than once",
    ),
    "no size": (
        "space: {choices: {hidden_size: []}}",
        "r.yaml:4:19: space.choices.hidden_size: needs at least one size",
    ),
    "negative size": (
        "space: {choices: {hidden_size: [8, -4]}}",
        "r.yaml:4:36: space.choices.hidden_size[1]: must be greater than 0, got -4",
    ),
    "lanes without choices": (
        "space: {lanes: {hidden_size: 2}}",
        "r.yaml:4:17: space.lanes.hidden_size: has no effect: ",
    ),
    "per-layer global axis": (
        "space: {choices: {hidden_size: [8]}, per_layer: [hidden_size]}",
        "r.yaml:4:50: space.per_layer[0]: hidden_size is one choice for the whole model",
    ),
    "per-layer without choices": (
        "space: {per_layer: [mamba_num_heads]}",
        "r.yaml:4:21: space.per_layer[0]: mamba_num_heads has no sizes",
    ),
    "batch not a multiple": (
        f"stages:\n- {{{STAGE}, micro_batch_size: 3}}",
        "r.yaml:5:42: stages[0].global_batch_size: 4 is not a multiple of micro_batch_size = 3",
    ),
    "draw cuts a micro-batch": (
        f"stages:\n- {{{STAGE}, micro_batch_size: 2, samples_per_draw: 3}}",
        "r.yaml:5:85: stages[0].samples_per_draw: 3 is not a multiple of micro_batch_size = 2",
    ),
    "step cuts a draw": (
        f"stages:\n- {{{STAGE}, samples_per_draw: 3}}",
        "r.yaml:5:42: stages[0].global_batch_size: 4 is not a multiple of samples_per_draw = 3",
    ),
    "draws of ranks that share experts": (
        f"{BUDGETS}parallel: {{tensor: 2, expert: 8, expert_tensor: 1}}\nstages:\n- {{{STAGE}, samples_per_draw: 2}}",
        "r.yaml:10:64: stages[0].samples_per_draw: must be a multiple of 4, since 4 data-parallel ranks of "
        "micro_batch_size 1 share experts, and with them a draw; write 4",
    ),
    "one draw a micro-batch, shared experts": (
        f"{BUDGETS}parallel: {{expert: 2}}\nstages:\n- {{{STAGE}, micro_batch_size: 2}}",
        "r.yaml:10:3: stages[0].samples_per_draw: must be a multiple of 4, since 2 data-parallel ranks of "
        "micro_batch_size 2 share experts, and with them a draw; write 4",
    ),
    "two stages of one name": (
        f"loss: {{kind: cross_entropy}}\nstages:\n- {{{STAGE}}}\n- {{{STAGE}}}",
        "r.yaml:7:4: stages[1].name: 'a' is already the name of stages[0]",
    ),
    "not uniform": (
        f"stages:\n- {{{STAGE}, budget_probs: unifrm}}",
        "r.yaml:5:64: stages[0].budget_probs: must be 'uniform', got 'unifrm', did you mean 'uniform'?",
    ),
    "unknown budget": (
        f"{BUDGETS}stages:\n- {{{STAGE}}}\n- {{name: b, tokens: 9, seq_length: 1, global_batch_size: 1, budget_probs: {{large: 0.5, smal: 0.5}}}}",
        "r.yaml:10:88: stages[1].budget_probs: unknown key 'smal', did you mean 'small'?",
    ),
    "odds do not sum to 1": (
        f"{BUDGETS}stages:\n- {{{STAGE}, budget_probs: {{large: 0.5, small: 0.4}}}}",
        "r.yaml:9:64: stages[0].budget_probs: probabilities must sum to 1, but they sum to 0.9",
    ),
    "negative odds": (
        f"{BUDGETS}stages:\n- {{{STAGE}, budget_probs: {{large: 1, small: -1}}}}",
        "r.yaml:9:89: stages[0].budget_probs.small: must be greater than or equal to 0, got -1",
    ),
    "distilling nothing": (
        f"stages:\n- {{{STAGE}}}",
        "r.yaml:1:1: loss.kind: forward_kl of a model from itself is always 0: ",
    ),
    "sequence alone": (
        "parallel: {sequence: true}",
        "r.yaml:4:12: parallel.sequence: needs parallel.tensor above 1",
    ),
    "virtual pipeline alone": (
        "parallel: {virtual_pipeline: 2}",
        "r.yaml:4:12: parallel.virtual_pipeline: needs parallel.pipeline above 1",
    ),
    "one virtual chunk": (
        "parallel: {pipeline: 2, virtual_pipeline: 1}",
        "r.yaml:4:25: parallel.virtual_pipeline: must be greater than or equal to 2, got 1",
    ),
    "dispatcher": (
        "parallel: {dispatcher: all2all}",
        "r.yaml:4:12: parallel.dispatcher: must be 'alltoall', 'allgather' or 'flex', got 'all2all', did you mean 'alltoall'?",
    ),
    "world size": (
        "parallel: {world_size: 12, tensor: 2, pipeline: 2, context: 2}",
        "r.yaml:4:12: parallel.world_size: 12 is not a multiple of tensor 2 x pipeline 2 x context 2 = 8",
    ),
    "world size, experts": (
        "parallel: {world_size: 12, tensor: 2, expert: 8, expert_tensor: 1}",
        "r.yaml:4:12: parallel.world_size: 12 is not a multiple of expert_tensor 1 x expert 8 x pipeline 1 = 8",
    ),
    "world size, batch": (
        f"loss: {{kind: cross_entropy}}\nparallel: {{world_size: 12, tensor: 2}}\nstages:\n- {{{STAGE}}}",
        "r.yaml:7:42: stages[0].global_batch_size: 4 is not a multiple of micro_batch_size 1 x 6 data-parallel ranks = 6",
    ),
}


@pytest.mark.parametrize(("text", "line"), WRONG.values(), ids=WRONG.keys())
def test_mistake_is_reported_in_its_place(complaints: Complaints, text: str, line: str) -> None:
    found = complaints(text)
    assert found[0].startswith(line)
    assert all(line.startswith("r.yaml:") for line in found)


MODEL = {
    "no source": ("model: {dtype: bf16}", "r.yaml:1:1: model: needs one of hf, checkpoint or sizes"),
    "two sources": (
        "model: {hf: a, checkpoint: b}",
        "r.yaml:1:1: model: hf and checkpoint are given, but they exclude",
    ),
    "no model": ("seed: 3", "r.yaml:1:1: required key 'model' is missing"),
}


@pytest.mark.parametrize(("text", "line"), MODEL.values(), ids=MODEL.keys())
def test_model_has_exactly_one_source(write: Write, text: str, line: str) -> None:
    write("r.yaml", text + "\nname: a\nrun_dir: b\n")
    with pytest.raises(UserError) as caught:
        load("r.yaml")
    assert str(caught.value).startswith(line)


WRONG_SIZES = {
    "M layers": (
        {"mamba_head_dim": 0, "mamba_state_dim": 0},
        "hybrid_layer_pattern: M layers need mamba_head_dim, mamba_state_dim above 0",
    ),
    "* layers": ({"kv_channels": 0}, "hybrid_layer_pattern: * layers need kv_channels above 0"),
    "E layers": (
        {"moe_ffn_hidden_size": 0},
        "hybrid_layer_pattern: E layers need moe_ffn_hidden_size above 0",
    ),
    "- layers": ({"ffn_hidden_size": 0}, "hybrid_layer_pattern: - layers need ffn_hidden_size above 0"),
    "symbol": (
        {"hybrid_layer_pattern": "'MX'"},
        "hybrid_layer_pattern: symbol 'X' at position 1 is not a layer type",
    ),
    "mamba groups": ({"mamba_num_heads": 5}, "mamba_num_heads: 5 is not a multiple of mamba_num_groups = 2"),
    "query groups": (
        {"num_attention_heads": 5},
        "num_attention_heads: 5 is not a multiple of num_query_groups = 2",
    ),
    "top-k": ({"moe_router_topk": 5}, "moe_router_topk: 5 is more than num_moe_experts = 4"),
}


@pytest.mark.parametrize(("change", "line"), WRONG_SIZES.values(), ids=WRONG_SIZES.keys())
def test_sizes_of_every_layer_type_are_checked(write: Write, change: dict[str, Any], line: str) -> None:
    sizes = {entry.split(": ")[0]: entry.split(": ")[1] for entry in SIZES.splitlines()} | change
    rows = [f"    {key}: {value}" for key, value in sizes.items()]
    write("r.yaml", "\n".join(["name: a", "run_dir: b", "model:", "  sizes:", *rows]))
    with pytest.raises(UserError) as caught:
        load("r.yaml")
    row = 5 + list(sizes).index(line.partition(":")[0])
    assert str(caught.value).startswith(f"r.yaml:{row}:5: model.sizes.{line}")
    assert "\n" not in str(caught.value)


def test_layers_that_do_not_occur_need_no_sizes(write: Write) -> None:
    write(
        "r.yaml",
        "{name: a, run_dir: b, model: {sizes: {hybrid_layer_pattern: '-', hidden_size: 8, vocab_size: 8, ffn_hidden_size: 8}}}",
    )
    assert load("r.yaml").model.sizes is not None


def test_top_k_fits_the_smallest_number_of_experts(write: Write) -> None:
    sizes = ", ".join(SIZES.splitlines()).replace("ME*-", "'ME*-'")
    write(
        "r.yaml",
        f"name: a\nrun_dir: b\nmodel: {{sizes: {{{sizes}}}}}\nspace: {{choices: {{num_moe_experts: [4, 1]}}}}",
    )
    with pytest.raises(
        UserError, match=r"^r.yaml:4:40: space.choices.num_moe_experts\[1\]: 1 experts are fewer"
    ):
        load("r.yaml")


def test_all_problems_come_at_once_even_across_sections(complaints: Complaints) -> None:
    found = complaints(
        f"""\
seed: x
seed: y
{BUDGETS}stages:
- {{{STAGE}, budget_probs: {{smal: 1}}}}
rank: {{sample: 3}}
""",
        "log.intervall=3",
        "nonsense",
    )
    assert sorted(line.partition(": ")[0] for line in found) == sorted(
        [
            "r.yaml:5:1",  # seed twice
            "r.yaml:5:1",  # seed is no number
            "r.yaml:11:79",  # rule between stages and budgets, though other sections are broken
            "r.yaml:12:8",
            "command line `log.intervall=3`",
            "command line `nonsense`",
        ]
    )
