"""The small world in which faults are tried: texts, a model, a trained family and quantised weights, made once.

``build`` runs in the zygote and leaves everything below one folder, which trials only read. Recipes lie in the folder
of a trial and write beside themselves (``run/``, ``cache/``), so that a trial touches nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moments import Strike
from zygote import Ran, Run, Zygote

SUBMODELS = ("large", "medium", "small")
SHAPE: dict[str, Any] = {
    "hybrid_layer_pattern": "MEM*E-", "hidden_size": 32, "vocab_size": 264, "ffn_hidden_size": 32,
    "moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 32, "num_moe_experts": 8, "moe_router_topk": 2,
    "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_state_dim": 16, "mamba_num_groups": 2,
    "mamba_chunk_size": 16, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16,
    "max_position_embeddings": 256,
}  # fmt: skip
_BASE = """
seed: 7
run_dir: run
model: {{checkpoint: {world}/{parent}, dtype: fp32}}
data:
  train: [{{path: {world}/data/train, weight: 1}}]
  valid: [{{path: {world}/data/valid, weight: 1}}]
  cache: cache
space:
  choices: {{hidden_size: [16, 32], moe_ffn_hidden_size: [16, 32], num_moe_experts: [4, 8]}}
log: {{interval: 2, eval_tokens: 128, eval_interval: 2, tensorboard: false}}
"""
_BUDGETS = """
budgets:
  large: {{metric: active_params, target: 1.0}}
  medium: {{metric: active_params, target: 0.8}}
  small: {{metric: active_params, target: 0.65}}
"""
RECIPES = {
    "rank": ("ckpt", "name: rank\nrank: {{samples: 4, seq_length: 32, micro_batch_size: 2}}\n"),
    "train": (
        "rank",
        "name: family\nrouter: {{inner_size: 16, sampling: hard, accept_missed_budgets: true}}\noptimizer: {{lr: 5e-3, warmup_steps: 1}}\n"
        "checkpoint: {{interval: 2, keep_last: 2}}\nstages:\n"
        "  - {{name: a, tokens: 384, seq_length: 32, global_batch_size: 4, micro_batch_size: 2}}\n"
        "  - {{name: b, tokens: 256, seq_length: 64, global_batch_size: 2, micro_batch_size: 2}}\n" + _BUDGETS,
    ),
    "quantize": (
        "train",
        "name: rounded\nquantize: {{format: nvfp4, samples: 2, seq_length: 32}}\n" + _BUDGETS,
    ),
}  # fmt: skip
_FILES = {
    "cluster.yaml": 'time: "0:30:00"\ncontainer: {runtime: none}\n',
    "chain.yaml": "name: pair\ncluster: cluster.yaml\nrun_dir: chain\njobs:\n"
    "  one: {recipe: one.yaml}\n  two: {recipe: two.yaml, after: [one]}\n",
}
_JOB = """
name: {name}
run_dir: chain/{name}
model: {{dtype: fp32, sizes: {sizes}}}
data: {{train: [{{path: {world}/data/train, weight: 1}}], cache: cache}}
loss: {{kind: cross_entropy}}
stages: [{{name: all, tokens: 2048, seq_length: 64, global_batch_size: 4, micro_batch_size: 2}}]
slurm: {{cluster: cluster.yaml, time: "0:30:00"}}
"""
# what a config.json of the family says besides the sizes
_CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "torch_dtype": "float32", "use_cache": True,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attention_bias": False, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "mlp_bias": False, "mlp_hidden_act": "relu2", "use_bias": False, "mamba_hidden_act": "silu",
    "mamba_proj_bias": False, "mamba_ssm_cache_dtype": "float32", "use_conv_bias": True, "time_step_min": 1e-30,
    "time_step_max": 0.1, "time_step_floor": 1e-4, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "residual_in_fp32": False,
}  # fmt: skip
# what Megatron-LM's parsed arguments say of such a model besides its sizes
_ARGUMENTS: dict[str, Any] = {
    "num_experts": 8, "normalization": "RMSNorm", "squared_relu": True, "swiglu": False, "quick_geglu": False,
    "position_embedding_type": "none", "add_bias_linear": False, "group_query_attention": True,
    "untie_embeddings_and_output_weights": True, "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "mtp_num_layers": None,
}  # fmt: skip
_SLURM = {
    "sbatch": '[ "$1" = --test-only ] && { cat >/dev/null; exit 0; }\n'
    'for script in "$@"; do :; done\nname=$(sed -n \'s/^#SBATCH --job-name=//p\' "$script" | head -1)\n'
    'exec 9>>"$FAULTS_QUEUE.lock"; flock 9\nnext=$(( $(cat "$FAULTS_QUEUE.last" 2>/dev/null || echo 4100) + 1 ))\n'
    'echo "$next" >"$FAULTS_QUEUE.last"; echo "$next $name" >>"$FAULTS_QUEUE"; echo "$next"\n',
    "squeue": 'while read -r id name; do echo "$id|PENDING|Priority|N/A|0:00||$name"; done '
    '< <(cat "$FAULTS_QUEUE" 2>/dev/null)\n',
    "scancel": 'for id in "$@"; do [ -e "$FAULTS_QUEUE" ] && sed -i "/^$id /d" "$FAULTS_QUEUE"; done; exit 0\n',
    "scontrol": 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1\n',
}


class World:
    """Where things lie.

    ``hf``, ``other_hf``: models of random weights; ``ckpt``, ``rank``, ``train``, ``quantize``: what the commands of
    these names made, one after another; ``family``: the elastic directory; ``sharded``: it in several files;
    ``reported``: ``quantize`` with its report; ``foreign``: ``ckpt`` as another program writes it; ``chains``: a chain in the queue;
    ``died.import``, ``died.rank``: what a kill left, a lock among it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def write_recipes(self, folder: Path) -> None:
        """Recipes and a chain, to be run in this folder."""
        for name, (parent, text) in RECIPES.items():
            recipe = (_BASE + text).format(world=self.root, parent=parent)
            (folder / f"{name}.yaml").write_text(recipe)
        for name, text in _FILES.items():
            (folder / name).write_text(text)
        sizes = json.dumps({k: v for k, v in SHAPE.items() if k != "mamba_chunk_size"})
        for name in ("one", "two"):
            (folder / f"{name}.yaml").write_text(_JOB.format(name=name, sizes=sizes, world=self.root))

    def slurm(self, queue: Path) -> dict[str, str]:
        """The environment in which the stand-ins for Slurm's programs note jobs in a file."""
        return {"PATH": f"{self.root / 'slurm'}{os.pathsep}{os.environ['PATH']}", "FAULTS_QUEUE": str(queue)}


def build(zygote: Zygote, root: Path) -> World:
    """Make the world in an empty folder; about ten seconds."""
    world = World(root)

    def done(*argv: object, folder: Path = root) -> Ran:
        [ran] = zygote.run(Run([str(a) for a in argv], str(folder)))
        assert ran.status == 0, f"{argv}: {ran.status}\n{ran.err}"
        return ran

    (root / "slurm").mkdir(parents=True)
    for name, text in _SLURM.items():
        (root / "slurm" / name).write_text(f"#!/bin/bash\n{text}")
        (root / "slurm" / name).chmod(0o755)
    lines = [f"{i} times {i} is {i * i}, and {i} plus 7 is {i + 7}.\n" for i in range(400)]
    (root / "train.txt").write_text("".join(lines))
    (root / "valid.txt").write_text("".join(lines[::13]))
    (root / "lines").mkdir()
    (root / "lines/lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:60]))
    done("prepare-data", "train.txt", "--output", "data/train", "--tokenizer", "bytes")
    done("prepare-data", "valid.txt", "--output", "data/valid", "--tokenizer", "data/train_tokenizer")
    done("worlds:write_hf", "hf", 1)
    done("worlds:write_hf", "other_hf", 2)
    done("import", "hf", "ckpt")
    for name in RECIPES:
        folder = root / f"{name}.work"
        folder.mkdir()
        world.write_recipes(folder)
        done(name, f"{name}.yaml", folder=folder)
        (folder / "run").rename(root / name)
        (folder / "cache").rename(root / f"{name}.cache")
        shutil.rmtree(folder)
    done("export", "train", "family", "--elastic")
    done("export", "train", "sharded", "--elastic", "--max-shard-size", "60KB")
    shutil.copytree(root / "quantize", root / "reported", ignore=shutil.ignore_patterns("checkpoints"))
    done("report", "reported")
    done("worlds:write_foreign", "ckpt", "foreign")
    for name, argv in {"import": ["import", "../hf", "out"], "rank": ["rank", "rank.yaml"]}.items():
        folder = root / f"died.{name}"
        folder.mkdir()
        world.write_recipes(folder)
        [ran] = zygote.run(Run(argv, str(folder), strike=Strike("signal", 9, signal.SIGKILL)))
        assert ran.status == -signal.SIGKILL and len(list(folder.rglob("*.lock"))) == 1, ran
    (root / "chains").mkdir()
    world.write_recipes(root / "chains")
    [ran] = zygote.run(
        Run(["submit", "chain.yaml"], str(root / "chains"), world.slurm(root / "chains/queue"))
    )
    assert ran.status == 0, ran.err
    return world


def write_hf(folder: str, seed: int | str) -> None:
    """A ``nemotron_h`` directory of random weights, with the byte tokenizer; in the zygote."""
    import torch
    from safetensors.torch import save_file

    from elastic_megatron.checkpoint.hf_names import hf_pieces
    from elastic_megatron.checkpoint.stored import model_tensors, stored_shapes
    from elastic_megatron.data.tokenizer import byte_tokenizer
    from elastic_megatron.space import ParentShape

    shape, out = ParentShape(**SHAPE), Path(folder)
    generator = torch.Generator().manual_seed(int(seed))
    weights = {}
    for key, size in stored_shapes(model_tensors(shape), hf_pieces).items():
        weight = 0.1 * torch.randn(size, generator=generator)
        weights[key] = 1 + weight if "norm" in key else weight.abs() if key.endswith("A_log") else weight
    config = {**_CONFIG, **shape.to_hf()}
    byte_tokenizer().save_pretrained(out)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=1))


def write_foreign(ours: str, folder: str) -> None:
    """The same weights as another program's checkpoint, with ``common.pt``; in the zygote."""
    from argparse import Namespace

    import torch

    source, out = next(Path(ours).glob("iter_*")), Path(folder)
    shutil.copytree(source, out)
    for name in ("elastic.json", "integrity.json", "digests.0.json"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "hf")
    arguments = Namespace(**{k: v for k, v in SHAPE.items() if k != "num_moe_experts"}, **_ARGUMENTS)
    torch.save({"args": arguments, "iteration": 0, "checkpoint_version": 3.0}, out / "common.pt")
    (out / "run_config.yaml").write_text(json.dumps({"model": SHAPE}))


def fresh(folder: Path, copies: Mapping[str, Path] = {}) -> Path:
    """An empty folder of this name, with copies of what a trial is to change."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)  # a mounted one stays
    for name, source in copies.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    return folder
