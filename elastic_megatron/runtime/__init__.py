"""What a training process needs before its first model: device, process groups, seeds, layer specs.

This package is the only place that knows about CUDA.  With a GPU it starts NCCL and patches nothing;
without one it starts gloo and installs the adaptations of :mod:`.cpu`, so that the same Megatron code
runs on a laptop.  Importing it costs torch; Megatron is imported inside the functions.
"""

from elastic_megatron.runtime.config import fused_experts, has_transformer_engine, transformer_config_defaults
from elastic_megatron.runtime.cpu import ADAPTATIONS, adapt
from elastic_megatron.runtime.device import Layout, Runtime, adopt, groups, layout, on_gpus, start, stop
from elastic_megatron.runtime.generators import untouched_generators
from elastic_megatron.runtime.launch import begin_fork, die_with_parent
from elastic_megatron.runtime.optimizer_layout import one_optimizer_layout
from elastic_megatron.runtime.specs import hybrid_stack_spec
from elastic_megatron.runtime.transfer import sent

__all__ = [
    "ADAPTATIONS",
    "Layout",
    "Runtime",
    "adapt",
    "adopt",
    "begin_fork",
    "die_with_parent",
    "fused_experts",
    "groups",
    "has_transformer_engine",
    "hybrid_stack_spec",
    "layout",
    "on_gpus",
    "one_optimizer_layout",
    "sent",
    "start",
    "stop",
    "transformer_config_defaults",
    "untouched_generators",
]
