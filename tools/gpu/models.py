"""The models of the check: Nano's widths on a GPU, tiny ones in a rehearsal; their data, their recipes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from elastic_megatron import runtime
from elastic_megatron.blocks import build_model
from elastic_megatron.checkpoint import distributed, tracker
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.resolve import budgets
from elastic_megatron.data.prepare import prepare
from elastic_megatron.data.tokenizer import byte_tokenizer
from elastic_megatron.recipe import Recipe, load
from elastic_megatron.space import ElasticSpace, ParentShape, SubmodelSpec
from gpu.bench import Bench

ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "recipes" / "nemotron3_nano_30b" / "plan.yaml"
TEXT = ROOT / "examples" / "data" / "shakespeare_train.txt"
VOCABULARY = 264  # of bytes, rounded up


@dataclass(frozen=True)
class Scale:
    """Sizes of a GPU's check, or of its rehearsal.

    Args:
        parent: widths; the steps choose its layers.
        choices: of the elastic axes, but for ``ffn_hidden_size`` those of the recipe for Nano.
        length: tokens of a sequence.
        lengths: of the kernels' sequences.
        experts: in models that are saved, so that a checkpoint takes seconds.
        dtype: of trained models, as a recipe names it.
    """

    parent: ParentShape
    choices: Mapping[str, list[int]]
    lanes: int
    length: int
    lengths: tuple[int, ...]
    experts: int
    dtype: str

    @property
    def heads(self) -> list[int]:
        """The numbers of Mamba heads that submodels have."""
        return self.choices["mamba_num_heads"]

    @cached_property
    def torch_dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[self.dtype]

    def space(self, pattern: str, **sizes: int) -> ElasticSpace:
        """All axes that such layers have."""
        parent = self.parent.override(hybrid_layer_pattern=pattern, **sizes)
        return ElasticSpace.build(parent, **self.section(parent))

    def section(self, parent: ParentShape) -> dict[str, Any]:
        """A recipe's ``space``."""
        choices = {
            a: sorted({min(c, parent.size(a)) for c in sizes})
            for a, sizes in self.choices.items()
            if parent.size(a)
        }
        return {"choices": choices, "lanes": {a: self.lanes for a in ("num_moe_experts",) if a in choices}}

    @staticmethod
    def narrow(space: ElasticSpace, *axes: str) -> SubmodelSpec:
        """The whole model but for the smallest width on these axes."""
        smallest = space.smallest().to_dict()
        return SubmodelSpec.of(space.full().to_dict() | {a: smallest[a] for a in axes})


_TINY = Scale(
    ParentShape(
        "M", hidden_size=64, vocab_size=VOCABULARY, max_position_embeddings=256, ffn_hidden_size=64,
        moe_ffn_hidden_size=32, moe_shared_expert_intermediate_size=32, num_moe_experts=8, moe_router_topk=2,
        moe_router_topk_scaling_factor=2.5, mamba_num_heads=8, mamba_head_dim=8, mamba_state_dim=16,
        mamba_num_groups=2, num_attention_heads=8, num_query_groups=2, kv_channels=8, mamba_chunk_size=16,
    ),
    {"hidden_size": [32, 64], "ffn_hidden_size": [32, 64], "moe_ffn_hidden_size": [16, 32],
     "num_moe_experts": [4, 8], "mamba_num_heads": [4, 6, 8]},
    lanes=2, length=32, lengths=(40, 64), experts=8, dtype="fp32",
)  # fmt: skip


def scale(bench: Bench) -> Scale:
    """Nano's, of which the layers ``-`` have the shared expert's width, or the rehearsal's."""
    if bench.rehearse:
        return _TINY
    recipe = load(NANO)
    assert recipe.model.sizes is not None
    wide = recipe.model.sizes.moe_shared_expert_intermediate_size
    parent = ParentShape.from_dict(recipe.model.sizes.model_dump() | {"ffn_hidden_size": wide})
    choices = {axis: sorted(sizes) for axis, sizes in recipe.space.choices.items()}
    choices["ffn_hidden_size"] = [wide // 2, wide]
    return Scale(parent, choices, 8, 8192, (8192, 12288), 16, "bf16")


@dataclass
class Numbers:
    """Normal numbers of a type, the same on every machine; given in that type, so that all who read them agree."""

    device: torch.device
    dtype: torch.dtype
    seed: int

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator).to(self.device, self.dtype)


def relative(found: Tensor, truth: Tensor) -> float:
    """Frobenius distance by the norm of ``truth``."""
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).norm() / truth.norm().clamp_min(1e-30))


def loud(model: nn.Module) -> nn.Module:
    """Weights twice as large and no vector of ones or zeros, in which a wrong mask would hide."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator).to(p) if p.dim() < 2 else None
            p.mul_(2) if noise is None else p.add_(0.2 * noise)
    return model


@contextmanager
def config(**changes: Any) -> Iterator[None]:
    """Models built in this context have these fields of ``TransformerConfig``."""
    fields = runtime.transformer_config_defaults
    with mock.patch.object(runtime, "transformer_config_defaults", lambda: {**fields(), **changes}):
        yield


def corpus(bench: Bench) -> Path:
    """Prefix of a data set of bytes, made by the first step that wants one."""
    made = bench.scratch / "corpus"
    if not made.exists():
        folder = bench.scratch / f"corpus.{os.getpid()}"
        folder.mkdir()
        byte_tokenizer().save_pretrained(folder / "tokenizer")
        (folder / "text.txt").write_text(TEXT.read_text()[: 20_000 if bench.rehearse else None])
        prepare([folder / "text.txt"], folder / "text", folder / "tokenizer")
        folder.rename(made)
    return made / "text"


def parent(bench: Bench, shape: ParentShape | None = None) -> Path:
    """A checkpoint with random weights and a family of three sizes, made once.

    ``shape`` is ``saved_shape`` unless given.
    """
    root = bench.scratch / "parent"
    if tracker.newest(root) is None:
        sizes, device = scale(bench), runtime.start(seed=3).device
        shape = shape or saved_shape(bench)
        model = loud(build_model(shape, dtype=sizes.torch_dtype).to(device))
        space = ElasticSpace.build(shape, **sizes.section(shape))
        axes = [a for a in space.axes if a != "mamba_num_heads"]
        family = {
            "full": space.full(),
            "medium": sizes.narrow(space, *axes[:2]),
            "small": sizes.narrow(space, *axes),
        }
        distributed.save(root, 0, [model], Manifest(shape, space, budgets_of(bench), family))
    return root


def saved_shape(bench: Bench) -> ParentShape:
    """A layer of each kind but the MLP, with few experts and a vocabulary of bytes."""
    sizes = scale(bench)
    return sizes.parent.override(
        hybrid_layer_pattern="MEM*", vocab_size=VOCABULARY, num_moe_experts=sizes.experts
    )


def budgets_of(bench: Bench) -> Any:
    return budgets(_recipe(bench, "family", {}))


def recipe(bench: Bench, name: str, *, steps: int, **sections: Any) -> Recipe:
    """A run on the parent: ``steps`` of two sequences, with these sections in place of or beside the usual ones."""
    length = scale(bench).length
    stage = {"name": "all", "tokens": steps * 2 * length, "seq_length": length, "global_batch_size": 2,
             "micro_batch_size": 1}  # fmt: skip
    source = [{"path": str(corpus(bench)), "weight": 1}]
    data = {"train": source, "valid": source, "cache": str(bench.scratch / "cache")}
    return _recipe(bench, name, {"data": data, "stages": [stage], **sections})


def _recipe(bench: Bench, name: str, sections: Mapping[str, Any]) -> Recipe:
    sizes = scale(bench)
    values = {
        "name": name,
        "seed": 5,
        "run_dir": str(bench.scratch / name),
        "model": {"dtype": sizes.dtype, "checkpoint": str(bench.scratch / "parent")},
        "space": sizes.section(saved_shape(bench)),
        "budgets": {
            "full": {"metric": "active_params", "target": 1.0},
            "medium": {"metric": "active_params", "target": 0.75},
            "small": {"metric": "active_params", "target": 0.6},
        },
        "router": {"inner_size": 16, "lr": 1e-2},
        "optimizer": {"lr": 1e-4, "warmup_steps": 1},
        "log": {"tensorboard": False, "eval_tokens": 2 * sizes.length},
        **sections,
    }
    file = bench.scratch / f"{name}.yaml"
    file.write_text(json.dumps(values))
    return load(file)


def logged(recipe: Recipe) -> list[dict[str, Any]]:
    """Lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (recipe.run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(recipe: Recipe) -> list[dict[str, Any]]:
    """Those of its steps."""
    return [line for line in logged(recipe) if "loss" in line]
