"""Which checkpoint a folder means. No torch: a login node may ask."""

from __future__ import annotations

import re
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
    path = directory / f"iter_{int(text):07d}" if text.isdecimal() else None
    if path is None or not (path / FILE).exists():
        names = ", ".join(p.name for p in complete(directory)) or "none"
        raise UserError(
            f"{tracker} says {text[:40]!r}, but complete checkpoints are: {names}; correct the file"
        )
    return path


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
    return sorted(folders, key=lambda p: int(p.name[5:]))
