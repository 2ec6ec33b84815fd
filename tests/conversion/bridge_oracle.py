"""Convert Hugging Face directories with Megatron-Bridge on a CPU, and leave what came out beside them.

python bridge_oracle.py HF_DIR OUT [HF_DIR OUT ...]

``OUT/imported.safetensors`` holds the state of the Megatron model that Bridge filled, ``OUT/exported.safetensors``
what Bridge exports of that model, and ``OUT/checkpoint`` the model as Bridge saves it. In a process of its own, since
nothing else should meet the empty module that Bridge takes for Transformer Engine.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

# what a machine without a GPU cannot have, and Bridge chooses for Nemotron-H
_ON_A_CPU = {
    "use_cpu_initialization": True,
    "bf16": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_shared_expert_overlap": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "cross_entropy_loss_fusion": False,
    "apply_rope_fusion": False,
}


def convert(directory: Path, out: Path) -> None:
    import torch
    from megatron.bridge import AutoBridge
    from safetensors.torch import save_file

    from elastic_megatron import runtime

    bridge: Any = AutoBridge.from_hf_pretrained(directory)
    provider = bridge.to_megatron_provider(load_weights=False)
    for name, value in _ON_A_CPU.items():
        setattr(provider, name, value)
    provider.params_dtype = torch.float32
    provider.hybrid_stack_spec = _stack
    provider.finalize()
    provider._pg_collection = runtime.groups()
    model = provider.provide(pre_process=True, post_process=True)
    bridge.load_hf_weights([model])
    out.mkdir()
    save_file(_copies(model.state_dict().items()), out / "imported.safetensors")
    save_file(
        _copies(bridge.export_hf_weights([model], cpu=True, show_progress=False)),
        out / "exported.safetensors",
    )
    _save(bridge, model, out / "checkpoint")


def _save(bridge: Any, model: Any, directory: Path) -> None:
    sys.meta_path.append(_Absent())
    from megatron.bridge.training import checkpointing

    checkpointing.save_sharded_modelopt_state = checkpointing.get_rng_state = lambda *_, **__: None
    bridge.save_megatron_model([model], directory)


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for packages that Bridge imports and needs for something else."""

    packages = ("modelopt", "datasets", "megatron.energon")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(name == p or name.startswith(f"{p}.") for p in self.packages):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> Any:
        from bridge_on_cpu import _Empty

        return _Empty(spec.name)

    def exec_module(self, module: Any) -> None:
        module.__version__ = "0.0.0"


def _stack() -> Any:
    from elastic_megatron import runtime

    return runtime.hybrid_stack_spec()


def _copies(named: Any) -> dict[str, Any]:
    import torch

    return {n: t.detach().clone().contiguous() for n, t in named if isinstance(t, torch.Tensor)}


def main(paths: list[str]) -> None:
    from bridge_on_cpu import _empty_transformer_engine

    from elastic_megatron import runtime

    runtime.start(seed=5)
    _empty_transformer_engine()
    for directory, out in zip(paths[::2], paths[1::2], strict=True):
        convert(Path(directory), Path(out))


if __name__ == "__main__":
    main(sys.argv[1:])
