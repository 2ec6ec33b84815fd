"""Floor 2: elastic execution of stock Megatron blocks, and the model builder."""

from .forward import forward_only
from .model import build_chunks, build_elastic_model, build_model, build_sliced_model, transformer_config
from .projection import projection
from .sliced import SlicedModel
from .specs import elastic_hybrid_stack_spec, sliced_stack_spec
from .stack import ElasticHybridStack, elastic_stack, running
from .widths import LayerWidths

__all__ = [
    "ElasticHybridStack",
    "LayerWidths",
    "SlicedModel",
    "build_chunks",
    "build_elastic_model",
    "build_model",
    "build_sliced_model",
    "elastic_hybrid_stack_spec",
    "elastic_stack",
    "forward_only",
    "projection",
    "running",
    "sliced_stack_spec",
    "transformer_config",
]
