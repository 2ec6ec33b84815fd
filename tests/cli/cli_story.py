"""Running commands in this process, and reading what they leave."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from elastic_megatron.cli import main

SUBMODELS = ("large", "medium", "small")


@dataclass(frozen=True)
class Ran:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object of stdout."""
        return json.loads(self.out)


def run(*arguments: object) -> Ran:
    """``elastic-megatron ARGUMENTS`` in this process, logging as it would alone: pytest's handlers are off."""
    out, err = io.StringIO(), io.StringIO()
    handlers, logging.root.handlers = logging.root.handlers, []
    level = logging.root.level
    logging.root.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(a) for a in arguments])
    except SystemExit as e:
        status = int(e.code or 0)
    finally:
        logging.root.handlers = handlers
        logging.root.setLevel(level)
    return Ran(status, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Ran:
    """``run``, for commands that must succeed."""
    ran = run(*arguments)
    assert ran.status == 0, ran.err
    return ran


def refused(*arguments: object) -> list[str]:
    """``run``, for bad input: exit 2, nothing on stdout, only ``error:`` lines. Returns them without the prefix."""
    ran = run(*arguments)
    lines = ran.err.splitlines()
    assert ran.status == 2, (ran.status, ran.err)
    assert lines and all(line.startswith("error: ") for line in lines), ran.err
    assert ran.out == ""
    return [line.removeprefix("error: ") for line in lines]


def snapshot(*folders: Path) -> dict[str, str]:
    """Every file below the folders with the digest of its content."""
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for folder in folders
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Story:
    """Folder of the story and what its commands printed. Read-only for tests; ``copy`` what is to be changed."""

    root: Path
    ran: dict[str, Ran] = field(default_factory=dict)

    @property
    def text(self) -> Path:
        return self.root / "valid.txt"

    @property
    def elastic(self) -> Path:
        return self.root / "runs" / "elastic"

    def recipe(self, name: str) -> Path:
        return self.root / "recipes" / f"{name}.yaml"

    def slice(self, name: str) -> Path:
        return self.root / "slices" / name

    def play(self, key: str, *arguments: object) -> None:
        self.ran[key] = done(*arguments)
