"""Which checkpoint a folder means, and how a finished one takes its place. No torch: a login node may ask.

Folders of a checkpoint root: ``iter_0000100`` is complete; ``.iter_0000100.incomplete`` (or ``.incomplete.1`` …) is
being written or removed; ``.iter_0000100.replaced`` was complete under the same number, and holds for it until the new
one has the name.

What is old may not go at once: another process has a file open over NFS, something is mounted there. That never fails a
save: it is said, and tried again at the next one.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from ..files.reading import read_bytes
from ..files.writing import remove_abandoned, write_text
from .manifest import FILE

TRACKER = "latest_checkpointed_iteration.txt"
_NUMBER = re.compile(r"[0-9]{1,18}")
_LONGEST = 1024
_ITERATION = re.compile(r"iter_(\d{7,})")


def newest(directory: Path) -> Path | None:
    """The checkpoint that the tracker names; ``None`` where there is none yet.

    Raises ``UserError`` where the tracker is damaged or names a folder that is not there.
    """
    tracker = directory / TRACKER
    if not tracker.exists():
        return None
    text = read_tracker(tracker)
    if (number := iteration_of(text)) is not None:
        path = folder(directory, number)
        for candidate in (path, _hidden(path, "replaced")):
            if (candidate / FILE).exists():
                return candidate
    names = ", ".join(p.name for p in complete(directory)) or "none"
    raise UserError(f"{tracker} says {text[:40]!r}, but complete checkpoints are: {names}; correct the file")


def read_tracker(file: Path) -> str:
    """What a tracker file says. Raises ``UserError`` where it cannot be read, or is no short line."""
    try:
        return read_bytes(file, _LONGEST).decode(errors="replace").strip()
    except OSError as e:
        raise UserError(
            f"{file} cannot be read ({e.strerror}); write the number of an iteration there"
        ) from None


def iteration_of(text: str) -> int | None:
    """The iteration that a tracker names; ``None`` where it says anything else."""
    return int(text) if _NUMBER.fullmatch(text) else None


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
    """Make an empty folder to write to; what dead saves left in ``directory`` is removed, as far as it can be.

    Raises ``OSError`` where the folder cannot be made.
    """
    remove_abandoned(directory)
    for abandoned in directory.glob(".iter_*.incomplete*"):
        _remove(abandoned)
    path = temporary(directory, iteration)
    if path.exists():
        path.rename(_dying(path))
    path.mkdir(parents=True)


def publish(directory: Path, iteration: int) -> None:
    """Give the written folder its name and point the tracker at it; at every moment the tracker names one.

    Raises ``OSError`` where the file system refuses a new name.
    """
    final = folder(directory, iteration)
    if (final / FILE).exists():
        replaced = _hidden(final, "replaced")
        if replaced.exists():
            _discard(replaced)
        final.rename(replaced)
    elif final.exists():
        _discard(final)
    temporary(directory, iteration).rename(final)
    point(directory, iteration)
    for old in directory.glob(".iter_*.replaced"):
        with _housekeeping(old):
            _discard(old)


def point(directory: Path, iteration: int) -> None:
    """Have the tracker name a complete checkpoint."""
    write_text(directory / TRACKER, f"{iteration}\n")


def prune(directory: Path, keep_last: int) -> None:
    """Keep the checkpoint that the tracker names and the ``keep_last`` - 1 before it; 0 keeps all.

    Later ones are left alone: they belong to a run that was set back to an older iteration.
    """
    named = newest(directory)
    past = [p for p in complete(directory) if named and iteration(p) <= iteration(named)]
    for old in past[:-keep_last] if keep_last else []:
        with _housekeeping(old):
            _discard(old)


def iteration(path: Path) -> int:
    """The number of an ``iter_*`` folder."""
    return int(path.name.split("_")[1].split(".")[0])


def _discard(old: Path) -> None:
    """Remove a folder, under a name that nobody takes for a complete checkpoint while it is half removed.

    Raises ``OSError`` where it cannot be renamed.
    """
    dying = _dying(old)
    old.rename(dying)
    _remove(dying)


def _remove(dying: Path) -> None:
    """Remove as much of a folder as goes now; of a link, the link."""
    failed: list[BaseException] = []
    with _housekeeping(dying):
        if dying.is_symlink():
            dying.unlink()
        else:
            shutil.rmtree(dying, onexc=lambda _, __, error: failed.append(error))
        if failed and dying.exists():
            raise failed[0]


@contextlib.contextmanager
def _housekeeping(old: Path) -> Iterator[None]:
    """A failure inside is a warning."""
    try:
        yield
    except OSError as e:
        print(
            f"warning: {old} cannot be removed now ({e.strerror}); the next save tries again",
            file=sys.stderr,
        )


def _dying(path: Path) -> Path:
    """A free name for a folder that goes."""
    first = temporary(path.parent, iteration(path))
    others = (first.with_name(f"{first.name}.{n}") for n in itertools.count(1))
    return next(name for name in itertools.chain([first], others) if not name.exists())


def _hidden(path: Path, state: str) -> Path:
    return path.with_name(f".{path.name}.{state}")
