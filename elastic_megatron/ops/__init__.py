"""Floor 1: tensor mathematics of elasticity. Torch only; no Megatron, and process groups only as arguments."""

from .chunked_kd import Projection, chunked_distillation_loss, chunked_token_losses
from .gather import gather_tensor
from .gumbel import draw_index, draw_several, gumbel_noise, gumbel_softmax, uniform
from .kd import distillation_loss, token_cross_entropy
from .mix import SubmodelMix
from .parallel import group_size, scale_gradient, sum_over, zigzag, zigzag_order
from .top_block import TopLogits
from .top_logits import top_logits

__all__ = [
    "Projection",
    "SubmodelMix",
    "TopLogits",
    "chunked_distillation_loss",
    "chunked_token_losses",
    "distillation_loss",
    "draw_index",
    "draw_several",
    "gather_tensor",
    "group_size",
    "gumbel_noise",
    "gumbel_softmax",
    "scale_gradient",
    "sum_over",
    "token_cross_entropy",
    "top_logits",
    "uniform",
    "zigzag",
    "zigzag_order",
]
