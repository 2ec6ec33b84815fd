"""Floor 2: which components matter. A calibration pass scores them; a ``Ranking`` keeps scores and orders."""

from .collect import collect
from .ranking import Ranking, order_of
from .reap import UNSEEN, expert_sums, reap_score

__all__ = ["UNSEEN", "Ranking", "collect", "expert_sums", "order_of", "reap_score"]
