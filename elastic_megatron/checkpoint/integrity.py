"""Digests of a checkpoint's files, so that damage is an error with a name and never a wrong weight.

``integrity.json`` is the file that Megatron's ``dist_checkpointing`` writes and checks with ``verify_integrity=True``
(SHA-256 of every file), with the sizes beside it. Megatron hashes on rank 0 and as a last pass over the finished
checkpoint; here the process that wrote a shard hashes it right after writing, and on loading the files are dealt to
the ranks. torch itself notices missing files and shards that end too early, but no changed byte of a tensor.
No torch: a login node may verify.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files.json_files import read_object, write_object
from ..files.reading import inside, open_regular
from ..space.stated import section, shown, whole_number

FILE = "integrity.json"
ALGORITHM = "sha256"
_PARTS = "digests.{}.json"
_DIGEST = re.compile("[0-9a-f]{64}")


def digest_part(folder: Path, rank: int, files: Iterable[Path]) -> None:
    """Leave the digests of the files that a rank wrote in ``folder``, for ``seal``.

    A disk that is full is not reported here but by Megatron's writer, to all ranks.
    """
    with contextlib.suppress(OSError):
        record(folder, rank, {f.name: _entry(f) for f in files})


def record(folder: Path, part: int, digests: Mapping[str, tuple[int, str]]) -> None:
    """Leave (size, digest) of files, taken while they were written, in ``folder`` for ``seal``."""
    write_object(folder / _PARTS.format(part), dict(digests))


def seal(folder: Path) -> None:
    """Write ``integrity.json`` over every file of a finished folder; files that no rank digested are read here."""
    known: dict[str, list[Any]] = {}
    for part in folder.glob(_PARTS.format("*")):
        with contextlib.suppress(ValueError):  # cut short by a disk that was full for a moment
            known |= read_object(part, "")
        part.unlink()
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    entries = {n: known.get(n) or _entry(folder / n) for n in names if n != FILE}
    write_object(
        folder / FILE,
        {
            "algorithm": ALGORITHM,
            "files": {n: digest for n, (_, digest) in entries.items()},
            "sizes": {n: size for n, (size, _) in entries.items()},
        },
    )


def verify(folder: Path, rank: int = 0, world: int = 1) -> None:
    """Compare this rank's share of the files with ``integrity.json``; without that file nothing is compared.

    Raises ``UserError`` that names the first file that is missing, cut short or changed.
    """
    files, sizes = _read(folder)
    for name in _share({n: sizes.get(n, 0) for n in files}, rank, world):
        if problem := _problem(inside(folder, name, folder / FILE), sizes.get(name), files[name]):
            raise UserError(f"{folder / name} {problem}; {_REMEDY}")


def verify_sizes(folder: Path) -> None:
    """As ``verify``, of all files, but without reading them."""
    files, sizes = _read(folder)
    for name in sorted(files):
        if problem := _problem(inside(folder, name, folder / FILE), sizes.get(name), None):
            raise UserError(f"{folder / name} {problem}; {_REMEDY}")


def _read(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Digests and sizes by file name, empty without ``integrity.json``."""
    file = folder / FILE
    if not os.path.lexists(file):
        return {}, {}
    data = read_object(inside(folder, FILE, folder), _REMEDY, _REMEDY)
    try:
        algorithm = data.get("algorithm")
        if algorithm != ALGORITHM:
            raise UserError(f"its algorithm is {shown(algorithm)}, this release reads {ALGORITHM}")
        files, sizes = section(data.get("files"), "files"), section(data.get("sizes", {}), "sizes")
        for name, digest in files.items():
            if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
                raise UserError(f"the digest of {shown(name)} is {shown(digest)}")
        for name, size in sizes.items():
            whole_number(size, f"the size of {shown(name)}", 0, 1 << 62)
    except UserError as e:
        raise UserError(f"{file} is damaged ({e}); {_REMEDY}") from None
    return dict(files), dict(sizes)


_REMEDY = "name an older iteration in the tracker file, or restore this one from a backup"


def _problem(file: Path, size: int | None, digest: str | None) -> str | None:
    try:
        found = file.stat().st_size if file.is_file() else -1
        if found < 0:
            return "is missing" if not file.exists() else "is no ordinary file"
        if size is not None and found != size:
            return f"has {found} bytes instead of {size}"
        changed = digest is not None and _digest(file) != digest
        return "is damaged: its bytes are not those that were saved" if changed else None
    except FileNotFoundError:
        return "is missing"
    except OSError as e:
        return f"cannot be read ({e.strerror})"


def _share(sizes: dict[str, int], rank: int, world: int) -> list[str]:
    """The files of one rank: the largest first, each to the rank that has least to read."""
    shares: list[list[str]] = [[] for _ in range(world)]
    loads = [0] * world
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += sizes[name]
    return shares[rank]


def _entry(file: Path) -> tuple[int, str]:
    return file.stat().st_size, _digest(file)


def _digest(file: Path) -> str:
    with open_regular(file) as f:
        return hashlib.file_digest(f, ALGORITHM).hexdigest()
