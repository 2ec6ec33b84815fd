"""What a target consists of: for each of its tensors, the rows and columns of which tensor of the source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..checkpoint.hf_keys import exported_fp32
from ..checkpoint.manifest import Manifest
from ..checkpoint.stored import ModelTensor, StoredModel, as_stored, model_tensors
from ..errors import UserError
from ..quantization.formats import Format
from ..space import ElasticSpace, ParentShape, SubmodelSpec, TensorLayout, undeal
from ..space.space import GLOBAL_AXES
from .blocks import part_columns, parted


@dataclass(frozen=True)
class Cut:
    """One tensor of a target.

    Args:
        target, source: the tensor, and the one it is cut from.
        rows, columns: positions in the source, in the target's order; ``None`` for all of them as they are.
        dtype: of the target.
    """

    target: ModelTensor
    source: ModelTensor
    rows: Tensor | None
    columns: Tensor | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Model:
    """A model to be written: a submodel of the source, or all of it.

    Args:
        shape: its sizes; where layers differ, the largest.
        layer_sizes: for each layer that differs from ``shape``, the sizes that do.
        cuts: its tensors, in its order.
    """

    shape: ParentShape
    layer_sizes: Mapping[int, Mapping[str, int]]
    cuts: Sequence[Cut]

    @cached_property
    def tensors(self) -> list[ModelTensor]:
        return [cut.target for cut in self.cuts]


def cut_model(
    source: StoredModel,
    submodel: str | None = None,
    *,
    plain_order: bool = False,
    dtype: torch.dtype | None = None,
) -> Model:
    """The model that a submodel of ``source`` is; the whole of it by default.

    Args:
        plain_order: undo the lanes, so that components lie by plain decreasing importance.
        dtype: of the weights that are not quantised; ``None`` keeps each tensor's own. The small tensors that the
            fact table marks fp32 (A_log, D, router and its bias), and dt_bias, are fp32 in any case where ``dtype``
            is given.

    A quantised model is cut as it is stored: rows and whole blocks of columns of every part, numbers as they are. A
    submodel has then the values that the same columns have in the source.

    Raises ``UserError`` for an unknown submodel, and for one that keeps parts of blocks.
    """
    manifest = source.manifest
    space, spec = _space(manifest, submodel)
    shape, layer_sizes = space.widest_shape(spec), _layer_sizes(space, spec)
    parents = {(t.layer, t.layout.name, t.expert): t for t in model_tensors(manifest.shape)}
    positions = _Positions(space, plain_order)
    layers, cuts = space.kept_layers(spec), []
    for target in model_tensors(shape, layer_sizes):
        layer = None if target.layer is None else layers[target.layer]
        widths = {"hidden_size": shape.hidden_size} if layer is None else dict(space.layer_sizes(spec, layer))
        expert = target.expert
        if expert is not None:
            kept = widths.pop("num_moe_experts", None)
            expert = expert if kept is None else positions.of_axis("num_moe_experts", kept)[expert]
        parent = parents[layer, target.layout.name, expert]
        for part in as_stored(parent, source.quantised):
            form = source.quantised.format if source.quantised and part.part else None
            rows, columns = positions.of_tensor(part, widths, form)
            own = replace(target, part=part.part)
            wanted = _dtype(target.layout, dtype) if part.part is None else None
            cuts.append(Cut(own, part, rows, columns, wanted or source.dtype(part)))
    return Model(shape, layer_sizes, cuts)


def widened(source: StoredModel, models: Sequence[Model]) -> Iterator[str]:
    """A line where tensors get a wider dtype because they are stored in one with others that have it."""
    found: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    for cut in (cut for model in models for cut in model.cuts):
        for key, own in source.dtypes(cut.source).items():
            if own != cut.dtype:
                found[key] = own, cut.dtype
    if found:
        (key, (own, wide)), *rest = found.items()
        more = f" ({len(rest)} more like it)" if rest else ""
        yield (
            f"note: {key} is {_named(own)} and is stored in one with tensors that are not; it becomes {_named(wide)}, "
            f"which loses nothing{more}"
        )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _space(manifest: Manifest, submodel: str | None) -> tuple[ElasticSpace, SubmodelSpec]:
    if submodel is None:
        space = manifest.space or ElasticSpace(manifest.shape, ())
        return space, space.full()
    spec = manifest.submodel(submodel)
    assert manifest.space is not None, "a manifest with submodels has a space"
    return manifest.space, spec


def _layer_sizes(space: ElasticSpace, spec: SubmodelSpec) -> dict[int, dict[str, int]]:
    differing = space.differing(spec)
    found: dict[int, dict[str, int]] = {}
    for new, old in enumerate(space.kept_layers(spec)):
        own = {a: n for a, n in space.layer_sizes(spec, old).items() if a in differing}
        if own:
            found[new] = own
    return found


def _dtype(layout: TensorLayout, dtype: torch.dtype | None) -> torch.dtype | None:
    return torch.float32 if dtype is not None and exported_fp32(layout) else dtype


class _Positions:
    """Positions of kept components, computed once for all tensors that are cut alike."""

    def __init__(self, space: ElasticSpace, plain_order: bool) -> None:
        self._space, self._plain = space, plain_order
        self._axes: dict[tuple[str, int], list[int]] = {}
        self._tensors: dict[object, tuple[Tensor | None, Tensor | None]] = {}

    def of_axis(self, name: str, width: int) -> list[int]:
        key = (name, width)
        if key not in self._axes:
            kept = self._space.kept(name, width)
            lanes, groups = self._space.lanes_of(name), self._space.parent.groups(name)
            if self._plain and name not in GLOBAL_AXES and lanes != groups:
                kept = [kept[i] for i in undeal(width, lanes, groups)]
            self._axes[key] = kept
        return self._axes[key]

    def of_tensor(
        self, source: ModelTensor, widths: Mapping[str, int], form: Format | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Rows and columns of a tensor; of a part of a weight in a format, those that the weight's are."""
        key = (source.layout, source.part, tuple(sorted(widths.items())))
        if key not in self._tensors:
            rows, columns = self._of_weight(source, widths)
            if form is not None and source.part is not None:
                rows = rows if source.part.columns else None
                columns = self._of_part(form, source, widths, columns)
            self._tensors[key] = tuple(None if p is None else torch.tensor(p) for p in (rows, columns))
        return self._tensors[key]

    def _of_weight(
        self, source: ModelTensor, widths: Mapping[str, int]
    ) -> tuple[list[int] | None, list[int] | None]:
        layout = source.layout
        kept = {a: self.of_axis(a, w) for a, w in widths.items()}
        found = [layout.gather(dim, source.sizes, kept) for dim in range(len(layout.dims))]
        changed = [
            None if p is None or p == list(range(n)) else p
            for p, n in zip(found, layout.shape(source.sizes), strict=True)
        ]
        assert not any(p is not None for p in changed[2:]), "axes lie in the first two dimensions"
        return changed[0], changed[1] if len(changed) > 1 else None

    def _of_part(
        self, form: Format, source: ModelTensor, widths: Mapping[str, int], columns: list[int] | None
    ) -> list[int] | None:
        assert source.part is not None
        try:
            return part_columns(form, source.part, columns)
        except ValueError:
            stored = _Positions(self._space, plain_order=False)
            if self._plain and stored._of_weight(source, widths)[1] != columns:
                raise UserError(
                    f"--plain-order undoes the lanes, which parts the blocks of {form.block} columns that share a "
                    f"scale in {form.algo}; leave it out, or quantise a directory in plain order"
                ) from None
            raise parted(form, source, widths, self._space, self.of_axis) from None


def by_source(models: Sequence[Model]) -> Iterator[tuple[ModelTensor, list[tuple[int, Cut]]]]:
    """Every tensor of the source that any model needs, in the source's order, with (model, cut) of each use."""
    uses: dict[str, list[tuple[int, Cut]]] = {}
    sources: dict[str, ModelTensor] = {}
    for i, model in enumerate(models):
        for cut in model.cuts:
            sources.setdefault(cut.source.name, cut.source)
            uses.setdefault(cut.source.name, []).append((i, cut))
    for name, tensor in sources.items():
        yield tensor, uses[name]
