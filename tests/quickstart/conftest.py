"""The quickstart with tiny recipes, played as a person plays it: started, interrupted, started again."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from quickstart_calls import Quickstart

RECIPES = Path(__file__).parents[1] / "cli" / "recipes"


@pytest.fixture(scope="session")
def played(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """Interrupted (as by Ctrl-C) while the parent trains; run again to its end; and once more."""
    quickstart = Quickstart(tmp_path_factory.mktemp("quickstart"))
    recipes = quickstart.root / "recipes"
    recipes.mkdir()
    (recipes / "parent.yaml").write_text(
        f"extends: {RECIPES / 'parent.yaml'}\nname: tiny-parent\n"
        "stages: [{name: parent, tokens: 15360, seq_length: 64, global_batch_size: 8, micro_batch_size: 4}]\n"
    )
    (recipes / "rank.yaml").write_text(f"extends: {RECIPES / 'rank.yaml'}\n")
    (recipes / "elastic.yaml").write_text(
        f"extends: {RECIPES / 'elastic.yaml'}\nname: tiny-elastic\n"
        "stages: [{name: a, tokens: 3072, seq_length: 64, global_batch_size: 8, micro_batch_size: 2}]\n"
    )
    lines = [f"{i} times {i} is {i * i}, and {i} plus 7 is {i + 7}.\n" for i in range(1200)]
    (quickstart.root / "train.txt").write_text("".join(lines))
    (quickstart.root / "valid.txt").write_text("".join(lines[::13]))

    metrics = quickstart.out / "work" / "parent" / "metrics.jsonl"
    quickstart.calls["interrupted"] = quickstart.call(
        until=lambda: metrics.exists() and metrics.stat().st_size > 0, number=signal.SIGINT, all_ranks=True
    )
    (quickstart.root / "metrics_interrupted").write_text(metrics.read_text())
    quickstart.calls["finished"] = quickstart.call("--json")
    quickstart.calls["again"] = quickstart.call("--json")
    return quickstart
