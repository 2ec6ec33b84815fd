"""Build a Megatron-Bridge provider's model on a CPU with an elastic stack, and say what came out, as JSON.

python bridge_on_cpu.py

Bridge imports transformer_engine; a module that is empty, put there after Megatron-Core found none, is enough. In a
process of its own, since nothing else should meet that module.
"""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))


class _Anything(type):
    """A class whose attributes are such classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __getitem__ = __or__


class _Empty(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        return getattr(_Anything("anything", (), {}), name)


def _empty_transformer_engine() -> None:
    pytorch = ("ops", "distributed", "float8_tensor", "fp8", "utils")
    names = ["transformer_engine", "transformer_engine.common", "transformer_engine.common.recipe"]
    names += ["transformer_engine.pytorch", *(f"transformer_engine.pytorch.{n}" for n in pytorch)]
    for name in names:
        module = _Empty(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__, module.__version__ = [], "0.0.0"
        sys.modules[name] = module


def main() -> None:
    from elastic_megatron import runtime

    runtime.start(seed=5)
    _empty_transformer_engine()
    import torch
    import yaml
    from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
    from megatron.bridge.utils.instantiate_utils import instantiate, register_allowed_target_prefix
    from megatron.bridge.utils.yaml_utils import dump_dataclass_to_yaml
    from tiny_models import SIZES, SPACE, transformer_fields

    from elastic_megatron.blocks import running
    from elastic_megatron.integrations.bridge import hybrid_stack_spec
    from elastic_megatron.ops import SubmodelMix
    from elastic_megatron.space import ElasticSpace, ParentShape, SubmodelSpec

    space = ElasticSpace.build(ParentShape.from_dict(SIZES), **SPACE)
    spec = hybrid_stack_spec(space)
    provider = HybridModelProvider(
        **transformer_fields(), bf16=False, vocab_size=SIZES["vocab_size"], seq_length=64, hybrid_stack_spec=spec,
        hybrid_layer_pattern=SIZES["hybrid_layer_pattern"], cross_entropy_loss_fusion=False, apply_rope_fusion=False,
    )  # fmt: skip
    provider.finalize()
    provider._pg_collection = runtime.groups()
    model = provider.provide(pre_process=True, post_process=True).eval()
    tokens = torch.arange(10)[None] % SIZES["vocab_size"]
    narrow = SubmodelSpec.of(space.full().to_dict() | {"hidden_size": 16, "mamba_num_heads": 2})
    with torch.no_grad():
        whole = model(tokens, torch.arange(10)[None], None)
        with running(model, SubmodelMix.one_hot(space, narrow, tokens.device)):
            small = model(tokens, torch.arange(10)[None], None)
    register_allowed_target_prefix("elastic_megatron.")
    again = instantiate(yaml.safe_load(dump_dataclass_to_yaml({"spec": spec})))["spec"]
    found = {
        "stack": type(model.decoder).__name__,
        "finite": bool(torch.isfinite(whole).all()),
        "difference": float((whole - small).norm() / whole.norm()),
        "yaml": again.func is spec.func and again.keywords == spec.keywords,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
