"""The differentiable twin of a ``SubmodelSpec``: probabilities over the choices of each axis."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from ..cost.sizes import LayerGroup, ModelSizes, feeds_attention, parent_fields
from ..space import ElasticSpace, SubmodelSpec
from ..space.axes import axis as axis_of


@lru_cache(maxsize=256)
def _prefix_table(space: ElasticSpace, axis: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[choices, size]: row c marks the stored positions (for depth: the layers) that choice c keeps."""
    table = torch.zeros(len(space.choices_of(axis)), space.parent.size(axis), dtype=dtype)
    for row, width in zip(table, space.choices_of(axis), strict=True):
        kept = space.layer_order[:width] if axis == "num_layers" else space.kept(axis, width)
        row[list(kept)] = 1
    return table.to(device)


@lru_cache(maxsize=256)
def _choice_values(space: ElasticSpace, axis: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(space.choices_of(axis), device=device, dtype=dtype)


class SubmodelMix:
    """Which submodel a micro-batch runs, as tensors that carry gradient to the budget router.

    ``probs[axis]`` is ``[choices]``, or ``[layers of the type, choices]`` for a per-layer axis. Masks are
    ``p @ T`` with T the table of lane prefixes, widths are ``p @ choices``; a one-hot p is exactly the
    submodel, so soft and hard sampling are one code path. A mix is a value: it is built for one micro-batch
    and never changed.

    Args:
        hard: the probabilities are one-hot and stay so. What the draw cut off then has no gradient either: sliced
            execution does not compute it, and masked execution must not depend on how it is run.
    """

    transparent = False  # no component is masked, and none needs a gradient of its mask
    weight = 1.0  # of the micro-batch's loss, which auxiliary losses inside the model share

    def __init__(self, space: ElasticSpace, probs: Mapping[str, Tensor], *, hard: bool = False) -> None:
        assert tuple(probs) == space.axes, (tuple(probs), space.axes)
        self.space = space
        self.probs = dict(probs)
        self.hard = hard
        self._spec: SubmodelSpec | None = None  # where it is known without a look at the device

    @classmethod
    def one_hot(
        cls,
        space: ElasticSpace,
        spec: SubmodelSpec,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> SubmodelMix:
        """The mix that is exactly ``spec``."""
        probs = {}
        for a in space.axes:
            choices, width = space.choices_of(a), spec[a]
            if isinstance(width, tuple):
                rows = [[float(c == w) for c in choices] for w in width]
                probs[a] = torch.tensor(rows, device=device, dtype=dtype)
            else:
                probs[a] = torch.tensor([float(c == width) for c in choices], device=device, dtype=dtype)
        mix = cls(space, probs, hard=True)
        mix._spec = SubmodelSpec.of({a: spec[a] for a in space.axes})
        return mix

    def tensors(self) -> tuple[Tensor, ...]:
        """The probabilities in axis order: what activation recomputation takes as explicit arguments."""
        return tuple(self.probs[a] for a in self.space.axes)

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The same mix over other tensors (those that recomputation detached)."""
        same = copy.copy(self)
        same.probs = dict(zip(self.space.axes, tensors, strict=True))
        return same

    def weighted(self, weight: float) -> Self:
        """The same mix for a micro-batch whose loss has this weight."""
        same = copy.copy(self)
        same.weight = weight
        return same

    def _row(self, axis: str, position: int) -> Tensor:
        p = self.probs[axis]
        return p[position] if p.dim() == 2 else p

    def mask(self, axis: str, position: int = 0) -> Tensor:
        """[size of the axis]: how much of each stored component the ``position``-th layer of its type keeps."""
        mask = self._expected(axis, position)
        return mask * mask.detach() if self.hard and mask.requires_grad else mask

    def _expected(self, axis: str, position: int = 0) -> Tensor:
        p = self._row(axis, position)
        return p @ _prefix_table(self.space, axis, p.device, p.dtype)

    def size(self, axis: str, position: int = 0) -> int:
        """Components that the ``position``-th layer of its type has of the axis, kept or not: length of ``mask``."""
        return self.space.parent.size(axis)

    def width(self, axis: str, position: int = 0) -> Tensor:
        """Expected width, a 0-d tensor."""
        p = self._row(axis, position)
        return p @ _choice_values(self.space, axis, p.device, p.dtype)

    def keep(self, layer: int) -> Tensor | None:
        """Probability that a layer runs; ``None`` where depth is not elastic."""
        if "num_layers" not in self.probs:
            return None
        return self.mask("num_layers")[layer]

    def argmax(self) -> SubmodelSpec:
        """The most probable submodel: one look at the device for all axes, none where the mix was made of one."""
        if self._spec is not None:
            return self._spec
        best = [p.argmax(-1).view(-1) for p in self.probs.values()]
        rows = iter(torch.cat(best).tolist())
        widths: dict[str, int | list[int]] = {}
        for (a, p), found in zip(self.probs.items(), best, strict=True):
            chosen = [self.space.choices_of(a)[next(rows)] for _ in range(len(found))]
            widths[a] = chosen if p.dim() == 2 else chosen[0]
        return SubmodelSpec.of(widths)

    def sizes(self) -> ModelSizes:
        """Expected sizes for the cost formulas: scalars for global axes, vectors for per-layer ones.

        Axes are drawn independently, so the expectation of a product of widths is the product of the
        expectations, and the formulas stay exact in expectation.
        """
        parent = self.space.parent
        hidden = self.width("hidden_size") if "hidden_size" in self.probs else parent.hidden_size
        depth = self._expected("num_layers") if "num_layers" in self.probs else None
        groups = []
        for symbol in sorted(set(parent.hybrid_layer_pattern)):
            members = parent.layers_of(symbol)
            for feeds in (False, True):
                chosen = [j for j, i in enumerate(members) if feeds_attention(parent, i) == feeds]
                if not chosen:
                    continue
                sizes = {**parent_fields(parent), "hidden_size": hidden}
                for a in self.space.axes:
                    if axis_of(a).symbol == symbol:
                        values = _choice_values(self.space, a, self.probs[a].device, self.probs[a].dtype)
                        width = self.probs[a] @ values
                        sizes[a] = _picked(width, tuple(chosen)) if width.dim() else width
                vector = any(hasattr(v, "dim") and v.dim() for v in sizes.values())
                weight: Tensor | int = len(chosen)
                if depth is not None:
                    weight = _picked(depth, tuple(members[j] for j in chosen))
                elif vector:
                    weight = torch.ones(len(chosen), device=self.tensors()[0].device)
                groups.append(LayerGroup(symbol, sizes, weight, feeds))
        return ModelSizes(parent, tuple(groups), hidden)


def _picked(values: Tensor, positions: tuple[int, ...]) -> Tensor:
    return values[_positions(positions, values.device)]


@lru_cache(maxsize=256)
def _positions(positions: tuple[int, ...], device: torch.device) -> Tensor:
    """On the device once: a list that indexes would be copied there each time."""
    return torch.tensor(positions, device=device)


class SlicedMix(SubmodelMix):
    """A hard mix as the model that has only the kept components sees it: masks of ones, with their gradients.

    Args:
        mix: one-hot.
        spec: the submodel that it is.
    """

    def __init__(self, mix: SubmodelMix, spec: SubmodelSpec) -> None:
        super().__init__(mix.space, mix.probs, hard=True)
        self.spec, self.weight = spec, mix.weight
        # asked once, since recomputation runs first without gradients
        self.transparent = not any(p.requires_grad for p in mix.tensors())

    def mask(self, axis: str, position: int = 0) -> Tensor:
        """[width of the axis], but for ``num_layers``, whose mask counts the parent's layers."""
        mask = super().mask(axis, position)
        if axis == "num_layers":
            return mask
        return mask[_kept_positions(self.space, axis, self.size(axis, position), mask.device)]

    def size(self, axis: str, position: int = 0) -> int:
        return self.spec.at(axis, position) if axis in self.spec else self.space.parent.size(axis)


@lru_cache(maxsize=256)
def _kept_positions(space: ElasticSpace, axis: str, width: int, device: torch.device) -> Tensor:
    return torch.tensor(space.kept(axis, width), device=device)
