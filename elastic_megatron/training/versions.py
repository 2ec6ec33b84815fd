"""Versions of the packages that decide a run's numbers."""

from __future__ import annotations

import importlib.metadata

VERSIONED = ("torch", "megatron-core", "transformers", "nvidia-modelopt", "elastic-megatron")


def versions() -> dict[str, str]:
    """By name of the distribution."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}
