"""Floor 2: elastic execution of stock Megatron blocks, and the model builder."""

from .model import build_elastic_model, build_model, build_sliced_model, transformer_config
from .specs import elastic_hybrid_stack_spec, sliced_stack_spec
from .stack import ElasticHybridStack, elastic_stack, running
from .widths import LayerWidths

__all__ = [
    "ElasticHybridStack",
    "LayerWidths",
    "build_elastic_model",
    "build_model",
    "build_sliced_model",
    "elastic_hybrid_stack_spec",
    "elastic_stack",
    "running",
    "sliced_stack_spec",
    "transformer_config",
]
