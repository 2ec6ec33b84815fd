"""The record of what was proven of which layout, and tests that need a GPU: a part of ``conftest.py``.

pytest tests/parallel --parallel-results docs/parallel_results.json
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from layouts import LAYOUTS, PROPERTIES


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``record(layout.name, "training")``: this test, if it passes, proves that property of that layout.

    To be said first, so that a failure counts too: a property is proven if every test that claims it passes.
    """

    def claim(layout: str, proves: str) -> None:
        assert layout in [known.name for known in LAYOUTS] and proves in PROPERTIES, (layout, proves)
        request.node.user_properties.append(("proves", [layout, proves]))

    return claim


class Results:
    """Layout -> property -> whether all tests that claim it passed. Skipped tests claim nothing."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.proven: dict[str, dict[str, bool]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed and not (report.passed and report.when == "call"):
            return  # a skipped test, or another phase of one that is heard of elsewhere
        for key, value in report.user_properties:
            if key == "proves":
                layout, proves = value
                properties = self.proven.setdefault(layout, {})
                properties[proves] = properties.get(proves, True) and report.passed

    def pytest_sessionfinish(self) -> None:
        ordered = {
            layout.name: {name: found[name] for name in PROPERTIES if name in found}
            for layout in LAYOUTS
            if (found := self.proven.get(layout.name))
        }
        self.file.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parallel-results", type=Path, metavar="FILE", help="write what was proven of each layout"
    )


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("parallel_results", default=None)
    if file is not None and not hasattr(config, "workerinput"):  # the workers of xdist report to this process
        config.pluginmanager.register(Results(file))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``gpu``, or ``gpu(2)``, are skipped where there are fewer GPUs."""
    if marker := item.get_closest_marker("gpu"):
        import torch

        needed, found = (marker.args or (1,))[0], torch.cuda.device_count()
        if found < needed:
            pytest.skip(f"needs {needed} CUDA device{'s' if needed > 1 else ''}, this machine has {found}")
