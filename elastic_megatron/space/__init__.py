"""Floor 0: shapes, axes, layouts, spaces, submodels and budgets. Standard library only."""

from .axes import AXES, AXIS_NAMES, Axis, axis
from .budget import Budget
from .layouts import BLOCKS, Segment, TensorLayout, ends, tensors_of
from .parent import ParentShape
from .space import ElasticSpace, stored_order, undeal
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
    "axis",
    "ends",
    "stored_order",
    "tensors_of",
    "undeal",
]
