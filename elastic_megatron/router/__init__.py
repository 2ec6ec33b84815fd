"""Floor 3: the budget router, which learns what widths each budget should have. Torch only."""

from .loss import budget_loss, relative_cost
from .router import BudgetRouter
from .schedule import Schedule

__all__ = ["BudgetRouter", "Schedule", "budget_loss", "relative_cost"]
