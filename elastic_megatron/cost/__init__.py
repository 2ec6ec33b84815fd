"""Floor 1: what a model costs, by one formula for integers and for expected (tensor) widths."""

from .account import Cost, account, metric, sizes_of_parent, sizes_of_spec
from .sizes import LayerGroup, ModelSizes

__all__ = ["Cost", "LayerGroup", "ModelSizes", "account", "metric", "sizes_of_parent", "sizes_of_spec"]
