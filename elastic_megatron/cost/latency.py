"""Measured time of a model: a table of seconds per layer over a grid of widths, read between its points.

The file is one JSON object, as ``tools/profile_latency.py`` writes it::

    {"format_version": 1, "device": "NVIDIA H100", "tokens": 8192, "unit": "seconds",
     "shape": {"mamba_state_dim": 128, ...},
     "symbols": {"M": {"axes": {"hidden_size": [1792, 2688], "mamba_num_heads": [48, 64]},
                       "seconds": [[1.0e-4, 1.2e-4], [1.4e-4, 1.7e-4]]}, ...},
     "ends": {"axes": {"hidden_size": [1792, 2688]}, "seconds": [3.0e-4, 4.0e-4]}}

``symbols`` holds one table per layer type of the pattern: the time of one such layer for ``tokens`` tokens
at every point of a grid, ``seconds[i][j]`` belonging to the i-th value of the first axis and the j-th of
the second. ``ends`` is the time of embedding, final norm and output layer. ``axes`` may be empty;
``seconds`` is a plain number then. ``shape`` (optional) states the sizes that the grid left alone; a model
that differs there is refused, because the table says nothing about it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files.json_files import read_object
from ..space import AXES
from ..space.layouts import Number
from ..space.stated import is_finite, section, shown, whole_number, whole_numbers
from .sizes import ModelSizes, parent_fields

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT_VERSION = 1
_REMEDY = "measure it with tools/profile_latency.py"


@dataclass(frozen=True)
class Grid:
    """Seconds on the full product of ``axes`` (name, ascending values), the last axis running fastest."""

    axes: tuple[tuple[str, tuple[int, ...]], ...]
    seconds: tuple[float, ...]

    def at(self, sizes: Mapping[str, Number]) -> Number:
        """Multilinear interpolation; exact at grid points, and constant beyond the edges of the grid.

        Numbers give a float. Tensors (0-d, or one entry per layer; they broadcast) give a tensor and carry
        gradient: the slope of the cell, at an inner grid point that of the cell above, beyond an edge 0.
        """
        widths = [sizes[name] for name, _ in self.axes]
        if any(hasattr(w, "detach") for w in widths):
            return self._at_tensors(widths)
        cells = [_locate(float(w), values) for w, (_, values) in zip(widths, self.axes, strict=True)]
        return math.fsum(weight * self.seconds[index] for index, weight in self._corners(cells))

    def _at_tensors(self, widths: list[Number]) -> Tensor:
        import torch

        like = next(w for w in widths if hasattr(w, "detach"))
        cells = []
        for w, (_, values) in zip(widths, self.axes, strict=True):
            if len(values) == 1:
                cells.append((0, 0.0))
                continue
            w = w.to(like) if hasattr(w, "detach") else like.new_full((), w)  # filled there, not copied
            grid = _constant(values, like.dtype, like.device)
            cell = torch.bucketize(w.detach(), grid[1:-1].contiguous(), right=True)
            low = grid[cell]
            cells.append((cell, ((w - low) / (grid[cell + 1] - low)).clamp(0, 1)))
        table = _constant(self.seconds, like.dtype, like.device)
        return sum((weight * table[index] for index, weight in self._corners(cells)), torch.zeros_like(like))

    def _corners(self, cells: list[tuple[Number, Number]]) -> Iterator[tuple[Number, Number]]:
        """(index into ``seconds``, weight) of a cell's corners; ``cells`` is (lower index, fraction)."""
        for corner in product((0, 1), repeat=len(cells)):
            index, weight = 0, 1.0
            for up, (low, fraction), (_, values) in zip(corner, cells, self.axes, strict=True):
                top = min(up, len(values) - 1)
                index = index * len(values) + low + top
                weight = weight * (fraction if up else 1 - fraction)
            yield index, weight


def _locate(width: float, values: tuple[int, ...]) -> tuple[int, float]:
    """The cell of a width and how far into it the width lies, both within the grid."""
    if len(values) == 1:
        return 0, 0.0
    cell = min(max(bisect_right(values, width) - 1, 0), len(values) - 2)
    fraction = (width - values[cell]) / (values[cell + 1] - values[cell])
    return cell, min(max(fraction, 0.0), 1.0)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied to a device once, since every training step reads the table."""
    import torch

    return torch.tensor(values, dtype=dtype, device=device)


@dataclass(frozen=True)
class LatencyTable:
    """Measured seconds per layer type and of the ends, for ``tokens`` tokens on ``device``."""

    path: str
    device: str
    tokens: int
    shape: tuple[tuple[str, Number], ...]
    symbols: tuple[tuple[str, Grid], ...]
    ends: Grid

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """Read and check a table; a file that has not changed is read once.

        Raises ``UserError`` where it is missing, no JSON, or its axes and numbers do not fit together.
        """
        try:
            return _load(str(path), Path(path).stat().st_mtime_ns)
        except OSError as e:
            raise UserError(f"latency table {path} cannot be read ({e.strerror}); {_REMEDY}") from None

    def seconds(self, model: ModelSizes) -> Number:
        """Time of the whole model: its layers at their sizes, weighted like every cost, plus the ends.

        Sizes between grid points are interpolated multilinearly, sizes outside the grid are clamped to its
        edge (no extrapolation, no gradient). Differentiable where sizes or layer weights are tensors.
        Raises ``UserError`` where the table lacks a layer type or an axis that the model varies.
        """
        self._check_parent(model)
        self._check_axes("ends", self.ends, model.ends(), model)
        tables, total = dict(self.symbols), self.ends.at(model.ends())
        for group in model.groups:
            if group.symbol not in tables:
                raise UserError(f"latency table {self.path} has no {group.symbol!r} layers; {_REMEDY}")
            self._check_axes(group.symbol, tables[group.symbol], group.sizes, model)
            total = total + group.total(tables[group.symbol].at(group.sizes))
        return total

    def _check_parent(self, model: ModelSizes) -> None:
        """Refuse a model of another family than the measured one, in a size that no axis varies."""
        mine, axes = parent_fields(model.parent), {a.name for a in AXES}
        for name, size in self.shape:
            if name not in axes and mine.get(name) != size:
                raise UserError(
                    f"latency table {self.path} is of a model with {name}={size}, this one has "
                    f"{mine.get(name)}; {_REMEDY}"
                )

    def _check_axes(self, name: str, grid: Grid, sizes: Mapping[str, Number], model: ModelSizes) -> None:
        """Refuse a model whose sizes differ from the measured ones along an axis that the grid lacks."""
        gridded, measured = {a for a, _ in grid.axes}, {**parent_fields(model.parent), **dict(self.shape)}
        for a in AXES:
            if a.symbol not in ("", name) or a.name in gridded or a.name not in sizes:
                continue
            if hasattr(sizes[a.name], "detach") or sizes[a.name] != measured[a.name]:
                raise UserError(
                    f"latency table {self.path}: {name!r} has no axis {a.name}, so it holds for "
                    f"{a.name}={measured[a.name]} only; {_REMEDY}"
                )


@lru_cache(maxsize=16)
def _load(path: str, _mtime_ns: int) -> LatencyTable:
    data = read_object(Path(path), _REMEDY, _REMEDY)
    try:
        if data["format_version"] != FORMAT_VERSION or data["unit"] != "seconds":
            raise UserError(f"latency table {path} has another format or unit; {_REMEDY}")
        return LatencyTable(
            path,
            str(data["device"]),
            whole_number(data["tokens"], f"latency table {path}: tokens", 1, 1 << 40),
            tuple(sorted(section(data.get("shape", {}), f"latency table {path}: shape").items())),
            tuple((s, _grid(g, f"latency table {path}: symbols.{s}")) for s, g in data["symbols"].items()),
            _grid(data["ends"], f"latency table {path}: ends"),
        )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"latency table {path} is damaged ({type(e).__name__}: {e}); {_REMEDY}") from None


def _grid(data: Mapping[str, Any], where: str) -> Grid:
    axes = tuple(
        (name, whole_numbers(values, f"{where}: {name}", 0, 1 << 40)) for name, values in data["axes"].items()
    )
    for name, values in axes:
        if name not in {a.name for a in AXES}:
            raise UserError(f"{where}: unknown axis {name!r}; {_REMEDY}")
        if not values or list(values) != sorted(set(values)):
            raise UserError(f"{where}: the values of {name} must ascend, got {list(values)}; {_REMEDY}")
    seconds = list(_flatten(data["seconds"], [len(v) for _, v in axes], where))
    return Grid(axes, tuple(seconds))


def _flatten(nested: Any, lengths: list[int], where: str) -> Iterator[float]:
    if isinstance(nested, list) != bool(lengths) or (lengths and len(nested) != lengths[0]):
        raise UserError(
            f"{where}: seconds must be nested like the axes, one number per grid point; {_REMEDY}"
        )
    if not lengths:
        if not is_finite(nested) or nested < 0:
            raise UserError(f"{where}: {shown(nested)} is no time; {_REMEDY}")
        yield float(nested)
        return
    for part in nested:
        yield from _flatten(part, lengths[1:], where)
