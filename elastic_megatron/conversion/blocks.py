"""Columns of quantised weights: those that share a scale are kept or dropped together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..checkpoint.stored import ModelTensor
from ..errors import UserError
from ..quantization.formats import Format, Part
from ..space import ElasticSpace, whole_blocks

Kept = Callable[[str, int], Sequence[int]]


def part_columns(form: Format, part: Part, columns: Sequence[int] | None) -> list[int] | None:
    """The columns of a stored part, for those of its weight; ``None`` for all of them as they are.

    Raises ``ValueError`` where the weight's are no whole blocks.
    """
    if columns is None or not part.columns:
        return None
    blocks = whole_blocks(columns, form.block)
    if blocks is None:
        raise ValueError("no whole blocks")
    per_block = form.block // part.columns
    return [block * per_block + i for block in blocks for i in range(per_block)]


def parted(
    form: Format, tensor: ModelTensor, widths: Mapping[str, int], space: ElasticSpace, kept: Kept
) -> UserError:
    """What to say of widths that keep parts of blocks: the axis, and the nearest widths that do not.

    Args:
        tensor: the weight of the source.
        widths: that are asked for, of each axis that touches the tensor.
        kept: (axis, width) -> the components that are kept.
    """

    def legal(axis: str, width: int) -> bool:
        chosen = {a: kept(a, width if a == axis else w) for a, w in widths.items()}
        found = tensor.layout.gather(1, tensor.sizes, chosen)
        return found is None or whole_blocks(found, form.block) is not None

    axes = [a for a in widths if any(a in s.factors for s in tensor.layout.dims[1])]
    narrowed = [a for a in axes if widths[a] != tensor.sizes[a]]
    what = f"{form.algo} columns share a scale in blocks of {form.block}, and {tensor.name} would be cut within one at "
    remedy = "slice the unquantised model, and quantise the slice"
    for axis in narrowed:
        lanes = space.lanes_of(axis)
        below = next((w for w in range(widths[axis], 0, -lanes) if legal(axis, w)), None)
        above = next((w for w in range(widths[axis], tensor.sizes[axis] + 1, lanes) if legal(axis, w)), None)
        if nearest := [str(w) for w in (below, above) if w]:
            in_lanes = f" in {lanes} lanes" if lanes > 1 else ""
            return UserError(
                f"{what}{axis}={widths[axis]}{in_lanes}; nearest legal widths: {', '.join(nearest)}. Choose another "
                f"submodel, or {remedy}"
            )
    return UserError(f"{what}{', '.join(f'{a}={widths[a]}' for a in narrowed or axes)}; {remedy}")
