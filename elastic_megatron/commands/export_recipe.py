"""``elastic-megatron export RECIPE``: every directory of a recipe's ``export`` section, in one pass over the weights.

A job that died is started again and finishes the rest. A directory gets its name after its last byte, so that what
has the name is complete; whether it is *this* recipe's is told by ``exports.json`` in the run folder: what was to
be written there, noted while the place was still empty.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.named import check_cut, described
from ..errors import UserError
from ..files.json_files import read_object, write_object
from ..files.lock import beside, locked
from ..recipe.deploy import RECORD

if TYPE_CHECKING:
    from ..conversion import Report, Request
    from ..conversion.copy import Progress
    from ..recipe import Recipe


@dataclass(frozen=True)
class Exported:
    """What was written now, and the directories that were there already."""

    report: Report
    kept: Sequence[Path]


def export(
    recipe: Recipe, *, max_shard_bytes: int, trust: bool = False, progress: Progress | None = None
) -> Exported:
    """Write the directories of ``recipe.export`` that are not there.

    Args:
        max_shard_bytes, trust, progress: as in ``conversion.to_hf``.

    Raises ``UserError`` for a recipe without ``export`` or ``model.checkpoint``, where a destination holds something
    that was not exported from this checkpoint in this way, and as ``conversion.to_hf``.
    """
    section, checkpoint = recipe.export, recipe.model.checkpoint
    if section is None or checkpoint is None:
        lacking = "export" if section is None else "model.checkpoint"
        raise UserError(f"the recipe has no {lacking}, so there is nothing to export; add it")
    if (manifest := described(checkpoint)) is not None:
        for name in section.submodels or (None,):
            check_cut(checkpoint, manifest, name, section.elastic is not None)
    import torch

    from ..checkpoint.source import open_stored
    from ..conversion import Report, to_hf

    source = open_stored(checkpoint)
    origin = {"checkpoint": str(source.path), "digest": digest(source.path), "dtype": section.dtype}
    requests, file = requests_of(recipe), recipe.run_dir / RECORD
    wanted = {str(r.directory): origin | _settings(r) for r in requests}
    if not _Record(file).lacks(wanted):  # what is only read is not locked
        return Exported(Report([], 0, 0, 0, verified=False), [r.directory for r in requests])
    with locked(beside(file), "export"):
        record = _Record(file)
        lacks = record.lacks(wanted)
        missing = [r for r in requests if str(r.directory) in lacks]
        report = Report([], 0, 0, 0, verified=False)
        if missing:
            with record.noting(lacks):
                report = to_hf(
                    source,
                    missing,
                    dtype={"fp32": torch.float32, "bf16": torch.bfloat16, None: None}[section.dtype],
                    max_shard_bytes=max_shard_bytes,
                    verify=section.verify,
                    trust=trust,
                    allow_nonfinite=section.allow_nonfinite,
                    progress=progress,
                )
    return Exported(report, [r.directory for r in requests if r not in missing])


def requests_of(recipe: Recipe) -> list[Request]:
    """The directories that ``recipe.export`` names."""
    from ..conversion import Request

    section = recipe.export
    assert section is not None
    elastic = [] if section.elastic is None else [Request(section.elastic, elastic=True)]
    folder = section.slices
    return elastic + [
        Request(folder / name, name, plain_order=section.plain_order)
        for name in (section.submodels if folder is not None else ())
        if folder is not None
    ]


def digest(folder: Path) -> str:
    """SHA-256 that tells checkpoints apart: of the digests of all files, or else of their names, sizes and times."""
    from ..checkpoint import integrity

    sealed = folder / integrity.FILE
    if sealed.exists():
        return hashlib.sha256(sealed.read_bytes()).hexdigest()
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    told = [(str(f.relative_to(folder)), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _settings(request: Request) -> dict[str, Any]:
    return {name: value for name, value in vars(request).items() if name != "directory"}


class _Record:
    """What each directory was to hold, by the recipes of one run folder."""

    def __init__(self, file: Path) -> None:
        self.file = file
        remedy = "remove it and what was exported"
        self.noted = read_object(file, remedy, remedy) if file.exists() else dict[str, Any]()
        if not all(isinstance(noted, dict) for noted in self.noted.values()):
            raise UserError(f"{file} is damaged; {remedy}")

    def lacks(self, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Of directories, those that are not there. Raises ``UserError`` as ``holds``."""
        return {name: what for name, what in wanted.items() if not self.holds(Path(name), what)}

    def holds(self, directory: Path, wanted: Mapping[str, Any]) -> bool:
        """Is the directory there, as wanted? Raises ``UserError`` where something else is."""
        if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
            return False
        noted = self.noted.get(str(directory))
        if noted is None:
            found = "holds something that this recipe did not write"
        elif noted.get("digest") != wanted["digest"]:
            found = f"was exported from another checkpoint, {noted.get('checkpoint')}"
        elif other := [key for key in wanted if key != "checkpoint" and noted.get(key) != wanted[key]]:
            found = f"was exported with {other[0]} {noted.get(other[0])} instead of {wanted[other[0]]}"
        else:
            return True
        raise UserError(f"{directory} {found}; remove it, or choose another destination")

    @contextmanager
    def noting(self, wanted: Mapping[str, Any]) -> Iterator[None]:
        """While directories are written: noted before, and if that fails, only what is there.

        Nothing where it was refused: what is there now is somebody else's, who was faster.
        """
        self._write({**self.noted, **wanted})
        try:
            yield
        except BaseException as error:
            gone = {name for name in wanted if type(error) is UserError or not Path(name).exists()}
            self._write({name: what for name, what in self.noted.items() if name not in gone})
            raise

    def _write(self, noted: dict[str, Any]) -> None:
        self.noted = noted
        write_object(self.file, noted)
