"""Where something is to be written: checked before any work is done, and nothing made."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UserError


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def writable(folder: Path) -> bool:
    """Can the folder be made, or be written to?"""
    return nearest(folder).is_dir() and os.access(nearest(folder), os.W_OK | os.X_OK)


def check_writable(folder: Path) -> None:
    """Raise ``UserError`` where a folder can neither be made nor written to."""
    if not writable(folder):
        place = nearest(folder)
        reason = "it may not be written to" if place.is_dir() else "Not a directory"
        raise UserError(f"{folder} cannot be written ({place}: {reason}); choose another destination")


def check_vacant(directory: Path) -> None:
    """Raise ``UserError`` unless a directory can be made, or is there and empty."""
    try:
        taken = os.path.lexists(directory) and (not directory.is_dir() or any(directory.iterdir()))
    except PermissionError:
        taken = True
    if taken:
        raise UserError(
            f"{directory} already exists and is not empty; choose another destination or remove it"
        )
    check_writable(directory)


def check_apart(target: Path, source: Path) -> None:
    """Raise ``UserError`` where a target is, or lies in, the folder that it is made from."""
    inner, outer = Path(os.path.realpath(target)), Path(os.path.realpath(source))
    if inner.is_relative_to(outer):
        raise UserError(f"{target} lies in {source}, which it is made from; choose a place beside it")
