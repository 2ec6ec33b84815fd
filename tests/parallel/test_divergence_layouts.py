"""What one rank sees is not finite, all ranks judge alike: they leave together, or go back together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import divergence_jobs
import pytest
from pool import RankPool

from elastic_megatron.errors import DIVERGED

pytestmark = pytest.mark.usefixtures("megatron")
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "DP2 overlap": {"overlap": True},
    "TP2": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
}
CHECKPOINT = {"interval": 2, "keep_last": 1}


@pytest.mark.parametrize("what", ["gradient", "weights"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_leave_together_and_keep_what_was_good(
    name: str, what: str, write: Callable[..., Path], ranks: RankPool
) -> None:
    loss = {"divergence_patience": 2}
    file = write(f"stop_{name}_{what}", False, 2, LAYOUTS[name], checkpoint=CHECKPOINT, loss=loss)
    steps = [5] if what == "weights" else [4, 5, 6, 7]
    found = ranks.run(divergence_jobs.spoiled, 2, str(file), 1, what, steps, timeout=240)
    assert {each["status"] for each in found} == {DIVERGED}
    assert len({each["said"] for each in found}) == 1 and "iter_0000004" in found[0]["said"]
    assert {each["newest"] for each in found} == {"iter_0000004"}


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_go_back_together(name: str, write: Callable[..., Path], ranks: RankPool) -> None:
    """The steps before the offending ones are, replayed, the same ones."""
    loss = {"divergence_patience": 2, "on_divergence": "rewind"}
    files = [
        write(f"{kind}_{name}", False, 2, LAYOUTS[name], checkpoint=CHECKPOINT, loss=loss)
        for kind in ("rewound", "straight")
    ]
    rewound, straight = (
        ranks.run(divergence_jobs.spoiled, 2, str(file), 1, "gradient", steps, timeout=240)
        for file, steps in zip(files, ([5, 6], []), strict=True)
    )
    assert {each["status"] for each in rewound} == {0} and rewound[0]["newest"] == "iter_0000010"
    lines = [
        {n: line for line in run[0]["lines"] if "loss" in line for n in [line["step"]]}
        for run in (rewound, straight)
    ]
    assert [n for n, line in lines[0].items() if not line["updated"]] == [6, 7]
    assert [lines[0][n]["loss"] for n in range(1, 6)] == [lines[1][n]["loss"] for n in range(1, 6)]
