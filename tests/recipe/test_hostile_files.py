"""Recipes, chains and cluster files that nobody wrote by hand end in lines, soon, whatever they hold."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_megatron.errors import UserError
from elastic_megatron.recipe import load, load_jobs

PLAIN = "name: a\nmodel: {hf: m}\ndata: {tokens: 1}\n"


def _laughs(d: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (d / "r.yaml").write_text("\n".join(levels))


def _text(text: str | bytes) -> Callable[[Path], object]:
    return lambda d: (d / "r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())


def _diamonds(d: Path) -> None:
    """Each file extends the next one twice: 2**30 ways down."""
    for i in range(30):
        (d / f"r{i}.yaml").write_text(f"extends: [r{i + 1}.yaml, r{i + 1}.yaml]\n")
    (d / "r30.yaml").write_text(PLAIN)
    (d / "r.yaml").write_text("extends: r0.yaml\n")


def _wide(d: Path) -> None:
    (d / "b.yaml").write_text(PLAIN)
    (d / "r.yaml").write_text(f"extends: [{', '.join(['b.yaml'] * 9000)}]\n")


def _fifo(d: Path) -> None:
    os.mkfifo(d / "b.yaml")
    (d / "r.yaml").write_text("extends: b.yaml\n")


def _chain(d: Path) -> None:
    (d / "b.yaml").write_text(PLAIN)
    jobs = "\n".join(f"  j{i}: {{recipe: b.yaml}}" for i in range(2000))
    (d / "r.yaml").write_text(f"name: c\ncluster: c.yaml\nrun_dir: r\njobs:\n{jobs}\n")


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "aliases of aliases": (_laughs, r"r\.yaml:\d+:\d+: more than 10000 values, aliases followed"),
    "diamonds": (_diamonds, "more than 64 files extend each other"),
    "many extends": (_wide, "more than 64 files extend each other"),
    "piped extends": (_fifo, r"extends: .*b\.yaml is a FIFO"),
    "device": (lambda d: (d / "r.yaml").symlink_to("/dev/zero"), "is a FIFO, a socket or a device"),
    "folder": (lambda d: (d / "r.yaml").mkdir(), "Is a directory"),
    "vast": (_text("# " + "x" * (1 << 20)), "larger than 128 KiB"),
    "many values": (_text("name: [" + "a," * 30_000 + "]"), "more than 10000 values"),
    "many keys": (_text("\n".join(f"k{i}: 1" for i in range(4000))), r"and \d+ problems more"),
    "deep": (_text("name: " + "[" * 50 + "]" * 50), "nested too deeply"),
    "deeper": (_text("name: " + "[" * 30_000), "nested too deeply"),
    "deep keys": (_text("".join(f"{' ' * i}a:\n" for i in range(90))), "nested too deeply"),
    "itself": (_text("name: &a [*a]"), "may not contain itself"),
    "long key": (_text("x" * 900 + ": 1\n" + PLAIN), "a key of 900 characters"),
    "long value": (_text(f"name: {'/' * 60_000}\nmodel: {{hf: m}}"), "is not a name"),
    "object": (_text("name: !!python/object/apply:os.system [id]"), "tag .* is not allowed"),
    "bytes": (_text(b"name: \xff\xfe"), "is not UTF-8"),
    "nul": (_text("name: a\0b"), "not allowed"),
    "chain": (_chain, "2000 are too many"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_hostile_file_ends_in_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """In a time that does not grow with what it stands for: that of 100 KiB of honest values bounds them all."""
    monkeypatch.chdir(tmp_path)
    make, said = FILES[kind]
    make(tmp_path)
    for reader in (load_jobs,) if kind == "chain" else (load, load_jobs):
        start = time.process_time()
        with pytest.raises(UserError, match=said) as error:
            reader("r.yaml")
        spent = time.process_time() - start
        assert max(map(len, str(error.value).splitlines())) < 1000 and str(error.value).count("\n") < 200
        assert spent < 100 * _honest(), "longer than a hundred small recipes"


def _honest() -> float:
    """CPU seconds of reading a small recipe, by the same parser, of this machine now."""
    from elastic_megatron.recipe.document import Reader

    text, start = "".join(f"k{i}: [1, 2, {{a: b}}]\n" for i in range(200)), time.process_time()
    Reader(lambda line, column: "", Path(), [], ()).read(text)
    return time.process_time() - start
