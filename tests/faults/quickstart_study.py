"""The quickstart dies again and again in one folder, each time further on, and finishes as if nothing had happened."""

from __future__ import annotations

import random
import signal
from pathlib import Path

from fault_cases import snapshot
from tally import Lane, Tally
from worlds import fresh
from zygote import Run

RECIPES = Path(__file__).parents[1] / "cli" / "recipes"
DEATHS = 6
_STAGE = (
    "stages: [{{name: a, tokens: {tokens}, seq_length: 64, global_batch_size: 8, micro_batch_size: 2}}]\n"
)
_SECONDS = 400.0
_RESULTS = ("out/parent_hf/", "out/elastic_hf/", "out/slices/", "out/run/ranking.")


def study(lane: Lane, deaths: int, seed: int, tally: Tally) -> None:
    """So many deaths, at shares of the time that an undisturbed run takes."""
    rng = random.Random(seed)
    folder = _prepare(lane)
    [ran] = lane.zygote.run(_run(folder))
    assert ran.status == 0, ran.err
    wanted = _results(folder)
    folder, history = _prepare(lane), []
    for _ in range(deaths):
        number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        after = rng.uniform(0.1, 0.9) * ran.wall
        [died] = lane.zygote.run(_run(folder, after, number))
        history.append(f"{number.name} after {after / ran.wall:.0%}")
        tally.count("quickstart", number.name, "by clock")
        if died.traceback or died.left or died.hung:
            kind = "traceback" if died.traceback else "left running" if died.left else "hang"
            tally.fault("quickstart", kind, ", then ".join(history), died.last)
    [ran] = lane.zygote.run(_run(folder))
    if ran.status:
        tally.fault(
            "quickstart", "does not finish", ", then ".join(history), f"exit {ran.status}: {ran.last}"
        )
        return
    found = _results(folder)
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            kind = "lost" if name not in found else "debris" if name not in wanted else "different"
            tally.fault("quickstart", kind, ", then ".join(history), name)


def _prepare(lane: Lane) -> Path:
    folder = fresh(lane.folder)
    (folder / "recipes").mkdir()
    for name, more in {
        "parent": _STAGE.format(tokens=5120),
        "rank": "",
        "elastic": _STAGE.format(tokens=2048),
    }.items():
        extended = f"extends: {RECIPES / name}.yaml\nname: tiny-{name}\n"
        (folder / "recipes" / f"{name}.yaml").write_text(extended + more)
    return folder


def _run(folder: Path, after: float | None = None, number: int = 0) -> Run:
    world = folder.parent / "world"
    argv = ["quickstart", "--out", "out", "--recipes", "recipes", "--text", str(world / "train.txt")]
    argv += ["--heldout", str(world / "valid.txt")]
    return Run(argv, str(folder), after=after, number=number, seconds=_SECONDS)


def _results(folder: Path) -> dict[str, str]:
    """Digests of what it makes; of everything else, that it is there."""
    found = snapshot(
        folder, lambda name: "/cache/" in name or "/tensorboard/" in name or "/checkpoints/" in name
    )
    return {name: digest if name.startswith(_RESULTS) else "there" for name, digest in found.items()}
