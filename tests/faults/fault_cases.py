"""The writing commands under trial, and what of their results must be equal bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from worlds import World, fresh
from zygote import Run


@dataclass(frozen=True)
class Case:
    """A command to be tried in a folder of its own.

    Args:
        argv: ``{w}`` stands for the world.
        copies: what lies in the folder before: name there -> name in the world.
        again: further commands that a killed one may need, which its message names; else the same again is enough.
    """

    name: str
    command: str
    argv: tuple[str, ...]
    copies: Mapping[str, str] = field(default_factory=dict)
    recipes: bool = False
    slurm: bool = False

    def prepare(self, world: World, folder: Path) -> Path:
        """The folder, as it is before the command."""
        fresh(folder, {name: world / source for name, source in self.copies.items()})
        if self.recipes:
            world.write_recipes(folder)
        return folder

    def run(self, world: World, folder: Path, argv: tuple[str, ...] = (), **how: object) -> Run:
        """The command, to be run in a prepared folder."""
        environment = world.slurm(folder / "queue") if self.slurm else {}
        return Run([a.format(w=world.root) for a in argv or self.argv], str(folder), environment, **how)


def _case(name: str, *argv: str, **how: object) -> Case:
    return Case(name, argv[0], argv, **how)


CASES = {
    case.name: case
    for case in (
        _case("import", "import", "{w}/hf", "out", "--verify"),
        _case("import elastic", "import", "{w}/sharded", "out"),
        _case("export", "export", "{w}/train", "out", "--elastic", "--verify", "--max-shard-size", "60KB"),
        _case("export one", "export", "{w}/train", "out", "--submodel", "small"),
        _case("export quantised", "export", "{w}/quantize", "out"),
        _case("slice", "slice", "{w}/family", "out", "--submodel", "medium", "--submodel", "small"),
        _case("slice checkpoint", "slice", "{w}/train", "out", "--submodel", "small"),
        _case("prepare-data", "prepare-data", "{w}/train.txt", "--output", "out/t", "--tokenizer", "bytes"),
        _case(
            "prepare-data split", "prepare-data", "{w}/lines/lines.jsonl", "--output", "out/t",
            "--tokenizer", "{w}/hf", "--valid-fraction", "0.2",
        ),
        _case(
            "prepare-data over", "prepare-data", "{w}/valid.txt", "--output", "out/train", "--tokenizer", "{w}/hf",
            copies={"out": "data"},
        ),
        _case("report", "report", "run", copies={"run": "train"}),
        _case("report quantised", "report", "run", copies={"run": "quantize"}),
        _case("rank", "rank", "rank.yaml", recipes=True),
        _case("train", "train", "train.yaml", recipes=True),
        _case("quantize", "quantize", "quantize.yaml", recipes=True),
        _case("submit", "submit", "chain.yaml", recipes=True, slurm=True),
    )
}  # fmt: skip

_CLOCK = re.compile(
    rb'"(step_ms|submitted|created|since|started|save_id|seconds|python)": ?("[^"]*"|[0-9.e+-]+)|written on [^<]*'
)

_LIMIT = 64 << 20  # nothing here is that large, but for files that are hostile
_JOB = re.compile(rb"(pair\.(?:one|two))\.[0-9a-f]{8}\b")  # each submission names its jobs anew
_UUID = re.compile(rb"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def snapshot(folder: Path, skip: Callable[[str], bool] = lambda _: False) -> dict[str, str]:
    """Digest of every file below a folder; of folders that are empty, their names.

    Times of the clock and the folder's own path do not count: two undisturbed runs differ in them.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if skip(name):
            continue
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = digest(path, folder)
        elif path.is_dir() and not any(path.iterdir()):
            found[name] = "empty folder"
    return found


def digest(path: Path, folder: Path) -> str:
    if (size := path.stat().st_size) > _LIMIT:
        return f"{size} bytes"
    data = path.read_bytes()
    for world in (
        f"{folder}-world",
        str(folder.parent / "world"),
    ):  # a copy of the world, with a damaged file
        data = data.replace(world.encode(), b"WORLD")
    data = data.replace(str(folder).encode(), b"FOLDER")
    data = _JOB.sub(rb"\1", data)
    if path.name == ".metadata":  # torch stamps every save with a new UUID
        data = _UUID.sub(b"UUID", data)
    elif path.name == "integrity.json":
        data = re.sub(rb'"\.metadata": "[0-9a-f]{64}"', b"", data)
    elif path.suffix in (".json", ".jsonl", ".html"):
        data = _CLOCK.sub(b"CLOCK", data)
    return hashlib.sha256(data).hexdigest()


def json_lines(path: Path) -> list[dict[str, object]]:
    """Lines of a log without the clock; those that a kill cut short are left out."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        lines.append({k: v for k, v in line.items() if k != "step_ms"})
    return lines
