"""A spike is a loss far above the median of those before it, in units of their median absolute deviation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_megatron.recipe.objective import Loss
from elastic_megatron.training.log import RunLog
from elastic_megatron.training.spikes import Spikes

losses = st.one_of(st.floats(0.1, 9), st.floats(100, 200))
steps = st.tuples(losses, st.sampled_from(["full", "small"]), st.sampled_from(["one", "two"]), st.booleans())


def line(
    step: int, loss: float | None, budget: Any = "full", stage: str = "one", updated: bool = True
) -> dict[str, Any]:
    return {"step": step, "loss": loss, "budget": budget, "stage": stage, "updated": updated, "lr": 0.0}


@given(drawn=st.lists(steps, min_size=1, max_size=60), window=st.integers(1, 12), threshold=st.floats(1, 8))
@settings(max_examples=60)
def test_scores_are_those_of_the_definition(
    drawn: list[tuple[float, str, str, bool]], window: int, threshold: float
) -> None:
    """By numpy, over the last ``window`` losses of the same stage and budget whose steps gave an update."""
    seen, past = Spikes(Loss(spike_window=window, spike_threshold=threshold)), {}
    for n, (loss, budget, stage, updated) in enumerate(drawn):
        found = seen.seen(line(n, loss, budget, stage, updated))
        before = past.setdefault((budget, stage), [])
        expected = None
        if updated and len(before[-window:]) >= window / 2:
            middle = np.median(before[-window:])
            deviation = 1.4826 * np.median(np.abs(np.array(before[-window:]) - middle))
            score = (loss - middle) / max(deviation, 1e-3 * middle)
            expected = score if score > threshold else None
        if updated:
            before.append(loss)
        assert found is None if expected is None else found is not None and np.isclose(found, expected)


def test_a_resumed_run_marks_the_steps_of_one_that_was_not_interrupted(tmp_path: Path) -> None:
    """What is usual is read from the lines that are kept; also where the run goes back in the same process."""
    rng = np.random.default_rng(3)
    lines = [line(n, float(2 + rng.uniform(-0.05, 0.05) + 3 * (n % 17 == 16))) for n in range(1, 61)]

    def log(name: str, resumed_at: int) -> RunLog:
        return RunLog(
            tmp_path / name, title="run", total=60, resumed_at=resumed_at, interval=100, tensorboard=False,
            active=True, spikes=Spikes(Loss(spike_window=16)),
        )  # fmt: skip

    def marked(name: str) -> list[tuple[int, float]]:
        found = [json.loads(text) for text in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [(each["step"], each["spike"]) for each in found if "spike" in each]

    with log("straight", 0) as straight:
        for each in lines:
            straight.step(each)
    assert [step for step, _ in marked("straight")] == [16, 33, 50]
    with log("resumed", 0) as first:
        for each in lines[:15]:
            first.step(each)
        first.rewound(8, {"why": "a test"})
        for each in lines[8:40]:
            first.step(each)
    with log("resumed", 31) as second:
        for each in lines[31:45]:
            second.step(each)
        second.rewound(32, {"why": "a test"})
        for each in lines[32:]:
            second.step(each)
    assert marked("resumed") == marked("straight")
