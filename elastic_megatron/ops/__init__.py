"""Floor 1: tensor mathematics of elasticity. Torch only; no Megatron, no process groups."""

from .gather import gather_tensor
from .gumbel import draw_index, gumbel_noise, gumbel_softmax, uniform
from .kd import distillation_loss
from .mix import SubmodelMix

__all__ = [
    "SubmodelMix",
    "distillation_loss",
    "draw_index",
    "gather_tensor",
    "gumbel_noise",
    "gumbel_softmax",
    "uniform",
]
