"""Which checkpoint a folder means, and how a finished one takes its place. No torch: a login node may ask.

Folders of a checkpoint root: ``iter_0000100`` is complete; ``.iter_0000100.incomplete`` is being written or
removed; ``.iter_0000100.replaced`` was complete under the same number, and holds for it until the new one has the
name.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ..errors import UserError
from .manifest import FILE

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})")


def newest(directory: Path) -> Path | None:
    """The checkpoint that the tracker names; ``None`` where there is none yet.

    Raises ``UserError`` where the tracker is damaged or names a folder that is not there.
    """
    tracker = directory / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text(errors="replace").strip()
    if text.isdecimal():
        path = folder(directory, int(text))
        for candidate in (path, _hidden(path, "replaced")):
            if (candidate / FILE).exists():
                return candidate
    names = ", ".join(p.name for p in complete(directory)) or "none"
    raise UserError(f"{tracker} says {text[:40]!r}, but complete checkpoints are: {names}; correct the file")


def resolve(path: Path) -> Path:
    """The ``iter_*`` folder meant by a path: itself, or the newest of a checkpoint root or run folder.

    Raises ``UserError`` where there is no checkpoint.
    """
    if (path / FILE).exists():
        return path
    for root in (path, path / "checkpoints"):
        if found := newest(root):
            return found
    raise UserError(f"{path} holds no checkpoint; give a run folder, a checkpoint folder or an iter_* folder")


def is_checkpoint(path: Path) -> bool:
    """Is this one of ours (a run folder, a checkpoint root or an ``iter_*`` folder)?"""
    return any((p / f).exists() for p in (path, path / "checkpoints") for f in (FILE, TRACKER))


def complete(directory: Path) -> list[Path]:
    """Complete ``iter_*`` folders, oldest first."""
    folders = [p for p in directory.glob("iter_*") if _ITERATION.fullmatch(p.name) and (p / FILE).exists()]
    return sorted(folders, key=iteration)


def folder(directory: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return directory / f"iter_{iteration:07d}"


def temporary(directory: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration is written."""
    return _hidden(folder(directory, iteration), "incomplete")


def begin(directory: Path, iteration: int) -> None:
    """Make an empty folder to write to; what dead saves left in ``directory`` is removed."""
    for abandoned in directory.glob(".iter_*.incomplete"):
        shutil.rmtree(abandoned)
    temporary(directory, iteration).mkdir(parents=True)


def publish(directory: Path, iteration: int) -> None:
    """Give the written folder its name and point the tracker at it; at every moment the tracker names one."""
    final = folder(directory, iteration)
    replaced = _hidden(final, "replaced")
    if (final / FILE).exists():
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
    else:
        shutil.rmtree(final, ignore_errors=True)
    temporary(directory, iteration).rename(final)
    _point(directory, iteration)
    for old in directory.glob(".iter_*.replaced"):
        shutil.rmtree(old)


def prune(directory: Path, keep_last: int) -> None:
    """Keep the checkpoint that the tracker names and the ``keep_last`` - 1 before it; 0 keeps all.

    Later ones are left alone: they belong to a run that was set back to an older iteration.
    """
    named = newest(directory)
    past = [p for p in complete(directory) if named and iteration(p) <= iteration(named)]
    for old in past[:-keep_last] if keep_last else []:
        dying = _hidden(old, "incomplete")  # half removed, it must not look complete
        old.rename(dying)
        shutil.rmtree(dying)


def iteration(path: Path) -> int:
    """The number of an ``iter_*`` folder."""
    return int(path.name.split("_")[1].split(".")[0])


def _point(directory: Path, iteration: int) -> None:
    written = directory / f".{TRACKER}.incomplete"
    with open(written, "w") as f:
        f.write(f"{iteration}\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(written, directory / TRACKER)


def _hidden(path: Path, state: str) -> Path:
    return path.with_name(f".{path.name}.{state}")
