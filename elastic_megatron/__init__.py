"""Star Elastic (arXiv 2605.07182) for Megatron-Core: many nested model sizes in one checkpoint.

The names below are the public interface. They are imported when they are first used, so that a login node without torch
can read recipes, count parameters and submit jobs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .blocks import build_elastic_model, elastic_hybrid_stack_spec, running
    from .cost import Cost, account
    from .errors import UserError
    from .ops import SubmodelMix, distillation_loss
    from .recipe import Recipe, load
    from .router import BudgetRouter
    from .space import Budget, ElasticSpace, ParentShape, SubmodelSpec

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "BudgetRouter",
    "Cost",
    "ElasticSpace",
    "ParentShape",
    "Recipe",
    "SubmodelMix",
    "SubmodelSpec",
    "UserError",
    "account",
    "build_elastic_model",
    "distillation_loss",
    "elastic_hybrid_stack_spec",
    "load",
    "running",
]
_FOLDERS = {
    "blocks": {"build_elastic_model", "elastic_hybrid_stack_spec", "running"},
    "cost": {"Cost", "account"},
    "errors": {"UserError"},
    "ops": {"SubmodelMix", "distillation_loss"},
    "recipe": {"Recipe", "load"},
    "router": {"BudgetRouter"},
    "space": {"Budget", "ElasticSpace", "ParentShape", "SubmodelSpec"},
}


def __getattr__(name: str) -> Any:
    for folder, names in _FOLDERS.items():
        if name in names:
            return globals().setdefault(name, getattr(import_module(f".{folder}", __name__), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
