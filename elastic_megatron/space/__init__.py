"""Floor 0: shapes, axes, layouts, spaces, submodels and budgets. Standard library only."""

from .axes import AXES, AXIS_NAMES, Axis, axis
from .budget import Budget
from .layouts import BLOCKS, Segment, TensorLayout, ends, tensors_of, whole_blocks
from .nesting import apart, not_part
from .parent import ParentShape
from .space import ElasticSpace, stored_order, undeal
from .stages import replicas_per_draw, stage_layers
from .submodel import SubmodelSpec

__all__ = [
    "AXES",
    "AXIS_NAMES",
    "BLOCKS",
    "Axis",
    "Budget",
    "ElasticSpace",
    "ParentShape",
    "Segment",
    "SubmodelSpec",
    "TensorLayout",
    "apart",
    "axis",
    "ends",
    "not_part",
    "replicas_per_draw",
    "stage_layers",
    "stored_order",
    "tensors_of",
    "undeal",
    "whole_blocks",
]
