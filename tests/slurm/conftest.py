"""Clusters for the tests of this folder: one a session, with and without the container stub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from local_slurm import LocalSlurm, build_pyxis_stub, missing, missing_for_stub


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is marked ``slurm``."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def slurm() -> Iterator[LocalSlurm]:
    """Four nodes, no plug-ins: any ``--container-*`` option is refused."""
    if reason := missing():
        pytest.skip(reason)
    with LocalSlurm() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def slurm_with_pyxis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalSlurm]:
    """Two nodes that accept pyxis's options and run every task on the host."""
    if reason := missing() or missing_for_stub():
        pytest.skip(reason)
    plugin = build_pyxis_stub(tmp_path_factory.mktemp("pyxis"))
    with LocalSlurm(nodes=2, plugins=[plugin]) as cluster:
        yield cluster
