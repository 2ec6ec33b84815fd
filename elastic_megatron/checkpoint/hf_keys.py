"""What Hugging Face calls a tensor, from the fact table. No torch: a login node may ask."""

from __future__ import annotations

from ..space import TensorLayout


def hf_keys(layout: TensorLayout, layer: int | None = None, expert: int | None = None) -> tuple[str, ...]:
    """The names of the tensors that hold it; several where Hugging Face keeps its segments apart."""
    local = (layout.hf,) if layout.hf else tuple(s.hf or s.label for s in layout.dims[0])
    prefix = "" if layer is None else f"backbone.layers.{layer}."
    return tuple(prefix + name.format(e=expert) for name in local)


def exported_fp32(layout: TensorLayout) -> bool:
    """dt_bias has Megatron's parameter dtype and is no fp32 tensor there, but exports of the family keep it so."""
    return layout.fp32 or layout.name == "mixer.dt_bias"


def module_of(key: str) -> str:
    """The module that a tensor belongs to."""
    return key.rpartition(".")[0]
