"""One single-process runtime, and one randomised model, for all importance tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import nn


@pytest.fixture(scope="session", autouse=True)
def one_process() -> Iterator[None]:
    from elastic_megatron import runtime

    runtime.start(seed=1)
    yield


@pytest.fixture(scope="session")
def model(one_process: None) -> nn.Module:
    """Shared: tests must leave it as they found it."""
    from importance_models import build

    return build()
