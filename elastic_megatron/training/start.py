"""Start the runtime in a recipe's parallel layout."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import fields

from .. import runtime
from ..checkpoint.quantised_layers import checked_of, in_use
from ..cost.layout import check_layout
from ..errors import UserError
from ..recipe import Recipe
from ..space import ElasticSpace, ParentShape, SubmodelSpec


def start(
    recipe: Recipe,
    shape: ParentShape,
    space: ElasticSpace | None,
    submodels: Collection[SubmodelSpec] | None = None,
) -> runtime.Runtime:
    """Process groups for ``recipe.parallel`` on the ranks that were started.

    Args:
        space: the widths that the submodels have or may get.
        submodels: where their widths stay as they are; no others are checked.

    Raises ``UserError`` for a layout that does not fit the model, one of its submodels, a stage's batches, the
    calibration or the blocks of ``recipe.quantize``, the kernels of a GPU where there is one, or the number of ranks,
    with the first problem in one line.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    parallel = recipe.parallel
    if parallel.world_size not in (None, world):
        raise UserError(
            f"parallel.world_size is {parallel.world_size}, but {world} processes were started; start "
            f"{parallel.world_size} or set parallel.world_size={world}"
        )
    parallel = parallel.model_copy(update={"world_size": world})
    frozen = submodels is not None
    checked = in_use(space, submodels) if space is not None and submodels is not None else space
    rest = checked_of(recipe, shape, frozen=frozen) | {"gpus": runtime.on_gpus()}
    if problems := check_layout(shape, checked, parallel, recipe.stages, **rest):
        more = f" (and {len(problems) - 1} more; see `plan`)" if len(problems) > 1 else ""
        raise UserError(f"{world} rank{'s' * (world > 1)} of this layout cannot run: {problems[0]}{more}")
    sizes = {field.name: getattr(parallel, field.name) for field in fields(runtime.Layout)}
    return runtime.start(seed=recipe.seed, timeout_minutes=parallel.distributed_timeout_minutes, **sizes)


def start_whole_stages(
    recipe: Recipe,
    shape: ParentShape,
    space: ElasticSpace | None,
    submodels: Collection[SubmodelSpec] | None = None,
) -> runtime.Runtime:
    """As ``start`` for one pass over data: a pipeline stage is one chunk, and training's batches do not matter."""
    parallel = recipe.parallel.model_copy(update={"virtual_pipeline": None})
    whole = recipe.model_copy(update={"parallel": parallel, "stages": ()})
    return start(whole, shape, space, submodels)
