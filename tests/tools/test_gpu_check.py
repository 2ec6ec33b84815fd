"""``tools/gpu_check.py`` covers every step on a CPU, and no step that breaks hides itself or the others."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import gpu_check  # noqa: E402
from gpu.bench import Bench, Skipped, Step  # noqa: E402
from gpu.eight import RUNS  # noqa: E402
from gpu.steps import STEPS  # noqa: E402

IN_ORDER = ["environment", "router", "mamba", "layers", "training", "speed", "quantized", "checkpoints", "ranking"]  # fmt: skip


def works(bench: Bench) -> None:
    bench.at_most("a number", 1.0, 2.0)


def raises(_: Bench) -> None:
    raise ValueError("first line\nlast line")


def leaves(_: Bench) -> None:
    sys.exit(0)


def crashes(bench: Bench) -> None:
    bench.number("before the crash", 3.0)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(bench: Bench) -> None:
    bench.number("child", subprocess.Popen(["sleep", "60"]).pid)
    time.sleep(60)


def above(bench: Bench) -> None:
    bench.at_most("too large", 3.0, 2.0)


def not_a_number(bench: Bench) -> None:
    bench.at_most("none", math.nan, 2.0)


def passes_over(_: Bench) -> None:
    raise Skipped("for want of a kernel")


BROKEN: dict[str, tuple[Callable[[Bench], None], str]] = {
    "raises": (raises, "ValueError: last line"),
    "leaves": (leaves, "SystemExit: 0"),
    "crashes": (crashes, "its process ended with signal SIGKILL"),
    "hangs": (hangs, "not done after 2 s; killed"),
    "above": (above, "1 of its numbers above the limit, the first one too large"),
    "not_a_number": (not_a_number, "1 of its numbers above the limit, the first one none"),
}


def runs(pid: int) -> bool:
    """Whether a process is there, and no zombie that nobody has waited for."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and outcomes of a rehearsal of steps of this module."""
    for variable in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):  # which the rehearsal sets
        monkeypatch.setenv(variable, "1")
    steps = [Step(n, n, f"{__name__}:{n}", 2.0 if n == "hangs" else 30.0) for n in names]
    status = gpu_check.main(["--rehearse", "--json", str(tmp_path / "found.json")], steps)
    return status, json.loads((tmp_path / "found.json").read_text())["steps"]


def test_a_step_that_breaks_is_reported_and_the_next_one_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It raises, leaves, is killed, hangs, or its number is above its limit or none: exit status 1, and why."""
    status, found = check(tmp_path, monkeypatch, *BROKEN, "passes_over", "works")
    assert status == 1
    by_name = {outcome["name"]: outcome for outcome in found}
    for name, (_, reason) in BROKEN.items():
        assert (by_name[name]["outcome"], by_name[name]["reason"]) == ("fail", reason)
    assert (by_name["passes_over"]["outcome"], by_name["works"]["outcome"]) == ("skip", "rehearsed")
    assert by_name["crashes"]["findings"][0]["value"] == 3.0
    assert not runs(by_name["hangs"]["findings"][0]["value"])
    assert capsys.readouterr().out.splitlines()[-1] == f"1 rehearsed, 1 skip, {len(BROKEN)} fail"


def test_without_a_failure_the_status_is_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(tmp_path, monkeypatch, "passes_over", "works")[0] == 0


def test_the_steps_stand_in_the_order_of_their_risk_and_end_within_12_minutes() -> None:
    assert [step.name for step in STEPS] == IN_ORDER
    assert sum(step.seconds for step in STEPS) < 12 * 60


def test_without_a_gpu_nothing_is_checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert gpu_check.main([], [Step("works", "works", f"{__name__}:works", 30.0)]) == 2
    assert "--rehearse" in capsys.readouterr().err


def test_a_rehearsal_runs_every_step_and_claims_no_gpu(tmp_path: Path) -> None:
    """At tiny shapes, in the same code: every step ends with a number and says what stood in for a GPU."""
    done = subprocess.run(
        [sys.executable, str(TOOLS / "gpu_check.py"), "--rehearse", "--slower", "3", "--json", str(tmp_path / "r.json")],
        capture_output=True, text=True, timeout=400, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "r.json").read_text())
    assert [s["name"] for s in found["steps"]] == IN_ORDER
    assert found["rehearsed"] and found["gpus"] == []
    for step in found["steps"]:
        assert step["outcome"] == "rehearsed" and step["rehearsed_with"], step
        assert any("value" in finding for finding in step["findings"]), step
    # told of every step, and never as passed
    assert done.stdout.count("\n    rehearsed with ") == len(IN_ORDER) and "\npass" not in done.stdout


EIGHT = TOOLS / "gpu_check_8.sh"


def test_the_shell_of_eight_gpus_parses_and_names_runs_that_exist() -> None:
    """Bash reads the whole script; each run that it trains has a recipe in ``gpu.eight``."""
    subprocess.run(["bash", "-n", str(EIGHT)], check=True, timeout=30)
    steps = [line.split() for line in EIGHT.read_text().splitlines() if line.startswith("step ")]
    trained = {s[4] for s in steps if s[3] in ("alone", "again")}
    assert trained == set(RUNS)


def test_eight_gpus_without_a_gpu_are_refused(tmp_path: Path) -> None:
    bash, empty = shutil.which("bash"), {"PATH": str(tmp_path)}
    assert bash is not None
    done = subprocess.run(
        [bash, str(EIGHT), str(tmp_path)], env=empty, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2 and "--rehearse" in done.stderr


@pytest.mark.slow
def test_eight_gpus_are_rehearsed_by_two_ranks(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(EIGHT), str(tmp_path), "--rehearse"], capture_output=True, text=True, timeout=1500,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert len(found) == 10 and {step["outcome"] for step in found} == {"rehearsed"}
