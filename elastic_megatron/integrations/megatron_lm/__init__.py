"""Elastic training by Megatron-LM's own ``pretrain``: its flags, its data, its loop, its checkpoints.

A recipe adds what Megatron has no flags for. It enters through what Megatron offers: extra arguments, the stack spec
and hooks of its model config, the hook that finalises gradients, a forward step. ``ElasticPretraining.run`` names
the one function of ``megatron.training`` that has no such door.
"""

from .arguments import add_arguments
from .pretraining import ElasticPretraining

__all__ = ["ElasticPretraining", "add_arguments"]
