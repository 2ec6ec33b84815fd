"""What Hugging Face calls a tensor, from the fact table. No torch: a login node may ask."""

from __future__ import annotations

import re

from ..space import TensorLayout


def hf_keys(layout: TensorLayout, layer: int | None = None, expert: int | None = None) -> tuple[str, ...]:
    """The names of the tensors that hold it; several where Hugging Face keeps its segments apart."""
    local = (layout.hf,) if layout.hf else tuple(s.hf or s.label for s in layout.dims[0])
    prefix = "" if layer is None else f"backbone.layers.{layer}."
    return tuple(prefix + name.format(e=expert) for name in local)


def canonical(name: str) -> str:
    """The name of a tensor or module as the hub has it, for one that some release of transformers wrote.

    In memory the model is called ``model``. The remote code of the first releases renames ``embedding.weight`` to
    ``embeddings.weight`` where it loads, and transformers 5 undoes that where it saves.
    """
    name = re.sub(r"^model\.", "backbone.", name)
    return "backbone.embeddings.weight" if name == "backbone.embedding.weight" else name


def exported_fp32(layout: TensorLayout) -> bool:
    """dt_bias has Megatron's parameter dtype and is no fp32 tensor there, but exports of the family keep it so."""
    return layout.fp32 or layout.name == "mixer.dt_bias"


def module_of(key: str) -> str:
    """The module that a tensor belongs to."""
    return key.rpartition(".")[0]
