"""Recipes and texts that come along: inside the package of a wheel, beside it in a clone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError
from .writing import write_bytes

_INSIDE = Path(__file__).resolve().parents[1] / "shipped"
MODELS = {"tiny": "tiny_cpu", "nano30b": "nemotron3_nano_30b", "nano12b": "nemotron_nano_v2_12b"}
"""Folders of recipes, by the names that ``init`` knows."""


def shipped() -> Path:
    """The folder of ``recipes`` and ``examples/data``; setup.py puts them into a wheel."""
    return _INSIDE if _INSIDE.is_dir() else _INSIDE.parents[1]


def write_project(folder: Path, model: str) -> list[Path]:
    """Write the recipes of a model below ``folder``, with cluster files, schemas and, for the tiny one, texts.

    Files that are there already, as they would be written, are left alone, so that a folder takes several models.

    Returns what was written. Raises ``UserError``, and writes nothing, where a file is there that says something else.
    """
    wanted = {folder / name.relative_to(shipped()): name.read_bytes() for name in _files(model)}
    for target, content in wanted.items():
        if target.exists() and not (target.is_file() and target.read_bytes() == content):
            raise UserError(
                f"{target} is there already, and is not what would be written; name another folder"
            )
    missing = [target for target in wanted if not target.exists()]
    for target in missing:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, wanted[target])
    return missing


def _files(model: str) -> Iterator[Path]:
    root = shipped()
    yield from sorted((root / "recipes").glob("*.schema.json"))
    for folder in (MODELS[model], "clusters"):
        yield from sorted((root / "recipes" / folder).glob("*.yaml"))
    if model == "tiny":
        yield from sorted((root / "examples" / "data").glob("*"))
