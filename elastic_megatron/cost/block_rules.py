"""Quantisation in blocks of input columns: a block lies on one rank and is kept or cut whole.

NVFP4 scales 16 neighbouring input columns of a weight together. A rank whose share of the columns is no multiple of 16
would quantise other blocks than one rank alone does, without a word; and a submodel, which keeps the first columns of
every lane, could not be cut out of the quantised weight unless it keeps whole blocks of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import gcd, lcm

from ..space import AXIS_NAMES, TensorLayout
from .layout_rules import SHARDED_BY, Problem, other_widths, split_less, widths_of
from .parallel import size_of
from .setting import Change, Setting


def whole_blocks(setting: Setting) -> Iterator[Problem]:
    """A problem for each axis with a width that leaves a rank, or a lane, part of a block."""
    if setting.blocks == 1:
        return
    for factors in dict.fromkeys(_inputs(t) for t in setting.quantised):
        inner = (1,)
        for axis in reversed(factors):
            found = list(_of_axis(setting, axis, inner))
            yield from found
            if found:
                break
            inner = tuple({n * w for n in inner for w in _sizes(setting, axis)})


def _inputs(tensor: TensorLayout) -> tuple[str, ...]:
    """The axes whose product is the number of input columns, outermost first."""
    (segment,) = tensor.dims[1]
    return tuple(f for f in segment.factors if isinstance(f, str))


def _sizes(setting: Setting, factor: str) -> tuple[int, ...]:
    """Every width of a factor, which is an axis or, as ``kv_channels`` is, a size that nothing changes."""
    return widths_of(setting, factor) if factor in AXIS_NAMES else (getattr(setting.shape, factor),)


def parts(setting: Setting, axis: str) -> int:
    """Equal parts of an axis that each must be whole blocks: ranks, and lanes where submodels cut them."""
    ranks = size_of(setting.parallel, SHARDED_BY[axis]) if axis in SHARDED_BY else 1
    cut = setting.space is not None and len(widths_of(setting, axis)) > 1
    return lcm(ranks, setting.space.lanes_of(axis)) if cut and setting.space is not None else ranks


def _of_axis(setting: Setting, axis: str, inner: tuple[int, ...]) -> Iterator[Problem]:
    """``inner``: the columns that one component of the axis stands for, in each submodel."""
    if axis not in AXIS_NAMES or (axis == "mamba_head_dim" and len(widths_of(setting, axis)) == 1):
        return  # a head's columns stay together
    block, split = setting.blocks, parts(setting, axis)
    for width, columns in product(widths_of(setting, axis), inner):
        if width % split or width // split * columns % block == 0:
            continue
        step, left = split * block // gcd(block, columns), width // split * columns
        where = f"in each of {split} parts (ranks, lanes)" if split > 1 else "of them"
        text = (
            f"NVFP4 takes input columns in blocks of {block}: {axis}={width} leaves {left} {where}, multiples of "
            f"{step} would do"
        )
        ranks = split_less(setting, SHARDED_BY[axis]) if axis in SHARDED_BY else []
        fp8: list[Change] = [{"quantize.format": "fp8"}]
        otherwise = f"train with such space.choices.{axis}" if setting.frozen else ""
        yield Problem(text, (*other_widths(setting, axis, step), *ranks, *fp8), otherwise)
        return
