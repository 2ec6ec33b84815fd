"""Between Hugging Face directories and Megatron checkpoints, and submodels out of either: streaming, any size."""

from __future__ import annotations

from .hf_target import MAX_SHARD_BYTES, Request, to_hf, weights_bytes
from .megatron_target import to_megatron
from .report import Report

__all__ = ["MAX_SHARD_BYTES", "Report", "Request", "to_hf", "to_megatron", "weights_bytes"]
