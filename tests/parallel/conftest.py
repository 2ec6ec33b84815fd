"""The ranks of the session, and what :mod:`results` adds to pytest."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pool import RankPool
from results import pytest_addoption, pytest_configure, pytest_runtest_setup, record
from runs import corpus, write

HOOKS = (pytest_addoption, pytest_configure, pytest_runtest_setup)
FIXTURES = (corpus, record, write)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Four ranks without a GPU; they start with the first job."""
    with RankPool(4) as pool:
        yield pool


@pytest.fixture(scope="session")
def gpu_ranks() -> Iterator[RankPool]:
    """A rank for each GPU, for tests that are marked ``gpu``."""
    with RankPool(torch.cuda.device_count(), cuda=True) as pool:
        yield pool
