"""From a recipe's section ``quantize`` and the shape of a model to what will be stored of it. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterable, Iterator
from fnmatch import filter as fnfilter
from fnmatch import translate

from ..cost.sizes import parent_fields
from ..errors import UserError
from ..quantization.formats import FORMATS, Format
from ..quantization.presets import PRESETS, Block, block_of
from ..recipe.deploy import Quantize
from ..recipe.types import did_you_mean
from ..space import ParentShape, TensorLayout, ends, tensors_of
from .hf_keys import hf_keys, module_of
from .hf_quantised import Quantised, described, quantisable


def planned(
    form: Format,
    shape: ParentShape,
    blocks: Container[Block],
    *,
    keep_feeding_mamba: bool,
    keep: Iterable[str] = (),
    version: str,
) -> Quantised:
    """How a model will be stored that is quantised by a recipe: the descriptions of its directory.

    Args:
        blocks: whose linears are quantised.
        keep_feeding_mamba: leave alone the Mamba layers that an attention layer follows, as the official Nemotron 3
            Nano checkpoints do.
        keep: more modules to leave alone, by Hugging Face name or pattern.
        version: of ModelOpt, whose layout it is.
    """
    pattern, left = shape.hybrid_layer_pattern, set[str]()
    more = re.compile("|".join(translate(p) for p in keep) or r"(?!)")
    for layer, layout, modules in _listed(shape):
        if (
            layer is None
            or not quantisable(layout)
            or block_of(pattern[layer], layout.name) not in blocks
            or (keep_feeding_mamba and pattern[layer : layer + 2] == "M*")
            or any(map(more.fullmatch, modules))
        ):
            left.update(modules)
    return described(form, sorted(left), version)


def planned_by(wanted: Quantize, shape: ParentShape, version: str = "") -> Quantised:
    """As ``planned``, by a recipe's section; without ``version`` to count with only.

    Raises ``UserError`` for an entry of ``keep`` that no module of such a model is called.
    """
    form = next(form for form in FORMATS.values() if form.name == wanted.format)
    modules = {module for *_, names in _listed(shape) for module in names} if wanted.keep else set[str]()
    if unknown := [name for name in wanted.keep if not fnfilter(modules, name)]:
        rest = ",".join(json.dumps(name) for name in wanted.keep if name not in unknown)
        raise UserError(
            f"quantize.keep: {unknown[0]!r} is no linear, convolution or embedding of a model of {shape.num_layers} "
            f"layers{_meant(unknown[0], modules)}; set quantize.keep=[{rest}]"
        )
    feeding, blocks = wanted.keep_feeding_mamba, PRESETS[wanted.preset].blocks
    return planned(form, shape, blocks, keep_feeding_mamba=feeding, keep=wanted.keep, version=version)


def _meant(name: str, modules: set[str]) -> str:
    """A question after the nearest name; after everything inside, where a name is that of a module around others."""
    if any(module.startswith(f"{name}.") for module in modules):
        return f", did you mean '{name}.*'?"
    return "" if re.search(r"[*?\[]", name) else did_you_mean(name, sorted(modules))


def _listed(shape: ParentShape) -> Iterator[tuple[int | None, TensorLayout, list[str]]]:
    """(layer, layout, modules) of everything that is quantised or listed as left alone; ends have no layer."""
    sizes = parent_fields(shape)
    for end in ends(tied=False):
        if end.role in ("lookup", "matmul"):
            yield None, end, [module_of(key) for key in hf_keys(end)]
    for layer, symbol in enumerate(shape.hybrid_layer_pattern):
        for layout in filter(_weighs, tensors_of(symbol, sizes)):
            for expert in range(shape.num_moe_experts) if layout.per_expert else (None,):
                yield layer, layout, [module_of(key) for key in hf_keys(layout, layer, expert)]


def _weighs(layout: TensorLayout) -> bool:
    """Is it the weight of a linear or a convolution, which ModelOpt lists where it is left alone?"""
    return layout.role == "matmul" or (layout.hf or "").endswith("conv1d.weight")
