"""What must hold of a command's folder: after a death, and after the same command has finished."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fault_cases import Case, digest, json_lines, snapshot
from zygote import Run

from elastic_megatron.checkpoint import integrity, tracker
from elastic_megatron.errors import UserError

if TYPE_CHECKING:
    from kill_study import Undisturbed
    from tally import Lane

# logs that grow, and caches that are rebuilt: half a line or half a cache may be there, and must do no harm
_GROWING = re.compile(r"run/metrics\.jsonl|cache/.*|queue.*")
_HIDDEN = re.compile(r"(^|/)\.[^/]*")
_CHECKPOINT = re.compile(r"(run/checkpoints|out)/iter_\d+")
_PRIVATE = re.compile(r"incomplete|partial|replaced|\.tmp|\.lock")
Problem = tuple[str, str]


def check_left(case: Case, folder: Path, before: dict[str, str], straight: Undisturbed) -> Iterator[Problem]:
    """After a death: whatever has a final name is whole, the old thing or the new one."""
    for name, wanted in straight.files.items():
        path = folder / name
        if _GROWING.fullmatch(name) or not path.is_file() or name.startswith("run/checkpoints/iter_"):
            continue
        if name == "chain/chain.json":  # grows with every job that Slurm takes
            yield from _no_json(path)
            continue
        found = digest(path, folder)
        if found not in (wanted, before.get(name)) and path.name != tracker.TRACKER:
            yield "half", f"{name} is neither the old one nor the new one ({path.stat().st_size} bytes)"
    yield from _half_folders(folder, straight)
    yield from _half_checkpoints(folder / "run/checkpoints")


def _no_json(path: Path) -> Iterator[Problem]:
    try:
        json.loads(path.read_text())
    except ValueError as e:
        yield "half", f"{path.name}: {e}"


def check_finished(case: Case, folder: Path, straight: Undisturbed, lane: Lane) -> Iterator[Problem]:
    """After the end: the bytes of an undisturbed run, and nothing besides."""
    if case.slurm:
        yield from _queued_once(folder)
    other: list[str] = []
    root, found = folder / "run/checkpoints", snapshot(folder)
    extra = {p.name for p in tracker.complete(root)} - {
        n.split("/")[2] for n in straight.files if "/iter_" in n
    }
    for name in sorted(found.keys() | straight.files.keys()):
        if name.startswith("cache/") and not _PRIVATE.search(name):
            continue  # index caches are named by where the data lies
        if case.command == "train" and _of_another_step(name, extra):
            continue
        if name not in found:
            yield "lost", f"{name} is missing"
        elif name not in straight.files:
            kind = "debris" if _PRIVATE.search(name) or _HIDDEN.search(name) else "more than undisturbed"
            yield kind, name
        elif found[name] != straight.files[name] and not (
            _GROWING.fullmatch(name) or name == "chain/chain.json"
        ):
            other.append(name)
    if other and not all(_CHECKPOINT.match(name) for name in other):
        yield "different", f"{' '.join(other)}: other bytes than an undisturbed run's"
    for checkpoint in sorted({m[0] for name in other if (m := _CHECKPOINT.match(name))}):
        # the same values, pickled after they were loaded, may share objects otherwise: then values are compared
        command = ["settled:compare", str(folder / checkpoint), str(straight.folder / checkpoint)]
        [ran] = lane.zygote.run(Run(command, str(folder)))
        if ran.status:
            yield "different", f"{checkpoint}: {ran.last}"
    lines = json_lines(folder / "run/metrics.jsonl")
    steps = [line.get("step") for line in lines if "step" in line]
    if any(line not in lines for line in straight.metrics) or len(steps) != len(set(steps)):
        yield "different", "run/metrics.jsonl lacks lines of an undisturbed run, or has steps twice"
    yield from _half_checkpoints(root)


def lock_left(problem: Problem) -> bool:
    """Of a process that died: the next writer's to take over. A command that has nothing to do takes no lock."""
    return problem[0] == "debris" and problem[1].endswith(".lock")


def _of_another_step(name: str, extra: set[str]) -> bool:
    """A run that was stopped between two checkpoints saved there, and keeps as many as it did before."""
    return any(part in extra for part in name.split("/")) or (
        "/iter_" in name and bool(extra) and "_0000004/" in name
    )


def _half_folders(folder: Path, straight: Undisturbed) -> Iterator[Problem]:
    """A directory that appears by renaming has all that it will have."""
    for top in {"/".join(n.split("/")[:-1]) for n in straight.files if n.endswith("/config.json")}:
        if (folder / top).is_dir() and (
            missing := [n for n in straight.files if n.startswith(f"{top}/") and not (folder / n).exists()]
        ):
            yield "half", f"{top} has its name, but no {missing[0]}"


def _half_checkpoints(root: Path) -> Iterator[Problem]:
    """What bears the name of a checkpoint is one, and the tracker names one where there are any."""
    try:
        for path in tracker.complete(root):
            integrity.verify(path)
        named = tracker.newest(root) if root.is_dir() else None
    except UserError as e:
        yield "half", str(e)
        return
    if tracker.complete(root) and named is None and len(tracker.complete(root)) > 1:
        yield "lost", "checkpoints are there, and the tracker names none"
    for path in root.glob("iter_*"):
        if path not in tracker.complete(root):
            yield "half", f"{path.name} has the name of a checkpoint, but no elastic.json"


def _queued_once(folder: Path) -> Iterator[Problem]:
    """Every job of the chain waits once."""
    queue = folder / "queue"
    names = (
        sorted(".".join(line.split()[1].split(".")[:2]) for line in queue.read_text().splitlines())
        if queue.exists()
        else []
    )
    if names != ["pair.one", "pair.two"]:
        yield "queued", f"in the queue: {' '.join(names) or 'nothing'}"


def compare(ours: str, theirs: str) -> None:
    """In the zygote: two checkpoints hold the same values under the same names. Raises ``AssertionError``."""
    import torch

    one, other = _values(Path(ours)), _values(Path(theirs))
    assert one.keys() == other.keys(), f"other names: {sorted(one.keys() ^ other.keys())[:3]}"
    for name, value in one.items():
        same = (
            value.equal(other[name]) if isinstance(value, torch.Tensor) else repr(value) == repr(other[name])
        )
        assert same, f"{name} differs"


def _values(folder: Path) -> dict[str, Any]:
    import torch
    from torch.distributed.checkpoint import FileSystemReader

    found = {}
    for index, place in FileSystemReader(folder).read_metadata().storage_data.items():
        data = (folder / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
        found[f"{index.fqn} {index.offset}"] = torch.load(io.BytesIO(data), weights_only=False)
    return found
