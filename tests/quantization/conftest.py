"""Denormals are kept here: tests that ran before in this process may have had them flushed, for speed."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def denormals() -> None:
    """hypothesis draws no floats where they are flushed."""
    torch.set_flush_denormal(False)
