"""What a plan says of ranks: does the layout fit, and can engines share the experts?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..checkpoint.quantised_layers import in_use
from ..cost.kernel_rules import served_experts
from ..cost.layout import check_setting
from ..cost.parallel import rank_grids
from ..space import stage_layers

if TYPE_CHECKING:
    from .plan import Subject


def layout_of(subject: Subject) -> dict[str, Any]:
    """Problems of the layout; group -> ranks, of dense and of expert parameters (``data`` is null where the world
    is unknown); layers of each pipeline stage, chunk by chunk, empty where there are too few."""
    shape, parallel = subject.manifest.shape, subject.setting.parallel
    problems = check_setting(subject.setting)
    dense, experts = rank_grids(parallel)
    parts = parallel.pipeline * (parallel.virtual_pipeline or 1)
    sizes = [len(part) for part in stage_layers(shape.num_layers, parts)] if parts <= shape.num_layers else []
    return {
        "ok": not problems,
        "problems": problems,
        "dense": dense,
        "expert": experts if shape.layers_of("E") else {},
        "layers_per_stage": [
            sizes[stage :: parallel.pipeline] for stage in range(parallel.pipeline) if sizes
        ],
    }


def serving(subject: Subject, tensor: int | None) -> list[str]:
    """Expert widths that cannot be served in NVFP4 on so many tensor ranks; by default on one, if they are to be."""
    nvfp4 = subject.quantised is not None and subject.quantised.format.name == "nvfp4"
    if not (tensor or nvfp4):
        return []
    space = subject.space
    if space is not None and subject.trained:
        space = in_use(space, subject.submodels.values())
    return list(served_experts(replace(subject.setting, space=space), tensor or 1))
