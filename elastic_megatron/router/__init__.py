"""Floor 3: the budget router, which learns what widths each budget should have. Torch only."""

from .loss import budget_loss, relative_cost
from .missed import Missed, missed
from .router import BudgetRouter
from .schedule import Schedule
from .step import RouterStep

__all__ = ["BudgetRouter", "Missed", "RouterStep", "Schedule", "budget_loss", "missed", "relative_cost"]
