"""Training that ends with sizes that are not what was asked for says so, and keeps what it has."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from cli_story import Story, run, snapshot


def test_a_family_off_its_budgets_is_an_error_until_it_is_accepted(story: Story, tmp_path: Path) -> None:
    """One line with each size, its cost and what would meet its budget; the checkpoint stays, and is accepted later."""
    shutil.copytree(story.elastic, tmp_path / "run")
    place = f"run_dir={tmp_path / 'run'}"
    before = snapshot(tmp_path / "run" / "checkpoints")
    ran = run("train", story.recipe("elastic"), place, "router.accept_missed_budgets=false")
    assert (ran.status, ran.out) == (2, "")
    [error] = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    sizes = re.findall(
        r"size (\w+) costs ([\d.]+)% of the parent in active_params, ([+-][\d.]+)% off its budget of ([\d.]+)%",
        error,
    )
    assert sizes and {name for name, *_ in sizes} <= {"medium", "small"}
    for _, realized, off, target in sizes:
        assert abs(float(realized) / float(target) - 1 - float(off) / 100) < 2e-3 and abs(float(off)) > 5
    assert "router.accept_missed_budgets=true" in error and str(tmp_path / "run/checkpoints") in error
    accepted = run(
        "train",
        story.recipe("elastic"),
        place,
        "router.accept_missed_budgets=false",
        "--accept-missed-budgets",
    )
    assert accepted.status == 0 and accepted.out.startswith("trained ")
    warned = [line for line in accepted.err.splitlines() if line.startswith("warning: size ")]
    assert len(warned) >= len(sizes)
    assert snapshot(tmp_path / "run" / "checkpoints") == before
