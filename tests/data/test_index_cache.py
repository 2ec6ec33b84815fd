"""A cache of indices gives what building anew gives, whatever a killed job left in it and whoever else builds."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_blend import TOKENS, build, rows, write_prefix

from elastic_megatron.data import index_cache
from elastic_megatron.errors import UserError
from elastic_megatron.files import lock

pytestmark = pytest.mark.usefixtures("megatron")


def touched(marker: Path) -> Any:
    class Hostile:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return os.mkdir, (str(marker),)

    return Hostile()


def pickled(file: Path, value: object) -> None:
    """As many bytes as the header promises."""
    text = pickle.dumps(value)
    words = -(-len(text) // 8)
    with file.open("wb") as f:
        header = {"descr": "|O", "fortran_order": False, "shape": (words,)}
        np.lib.format.write_array_header_1_0(f, header)
        f.write(text.ljust(8 * words, b"\0"))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty": lambda f: os.truncate(f, 0),
    "in its header": lambda f: os.truncate(f, 40),
    "a byte short": lambda f: os.truncate(f, f.stat().st_size - 1),
    "a byte long": lambda f: f.write_bytes(f.read_bytes() + b"\0"),
    "no numbers": lambda f: f.write_bytes(b"\x93NUMPY\x01\x00" + b"\xff" * 100),
    "pickled": lambda f: pickled(f, touched(f.parent / "ran")),
}


@pytest.fixture
def blended(tmp_path: Path) -> list[tuple[float, str]]:
    return [
        (0.7, write_prefix(tmp_path / "a", TOKENS["a"], 9)),
        (0.3, write_prefix(tmp_path / "b", TOKENS["b"], 5)),
    ]


def replaced_by_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def test_damaged_files_are_built_again_and_that_is_said(
    blended: list[tuple[float, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    want = rows(build(blended, cache), 50)
    files = sorted(cache.rglob("*.npy"))
    whole = {file: file.read_bytes() for file in files}
    assert len(files) == 8
    # Megatron would wait for a reader of a pipe for ever
    odd = [(file, replaced_by_a_pipe) for file in sorted(cache.rglob("*")) if file.is_file()]
    for file, damage in [*((f, d) for f in files for d in DAMAGE.values()), *odd]:
        damage(file)
        capsys.readouterr()
        assert (rows(build(blended, cache), 50) == want).all()
        assert str(file) in capsys.readouterr().err
        assert {file: file.read_bytes() for file in sorted(cache.rglob("*.npy"))} == whole
    assert not list(cache.rglob("ran")) and not list(cache.rglob(".*"))


def test_files_that_another_job_has_mapped_are_replaced_and_not_written_over(
    blended: list[tuple[float, str]], tmp_path: Path
) -> None:
    build(blended, tmp_path / "cache")
    files = sorted((tmp_path / "cache").rglob("*document_index.npy"))
    mapped = [os.open(file, os.O_RDONLY) for file in files]
    for file in sorted((tmp_path / "cache").rglob("*shuffle_index.npy")):
        os.truncate(file, 7)
    build(blended, tmp_path / "cache")
    assert [os.fstat(file).st_nlink for file in mapped] == [0, 0]


def test_a_cache_that_cannot_be_written_is_read(
    blended: list[tuple[float, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = rows(build(blended, tmp_path / "cache"), 50)

    def refused(*_: object) -> lock.Held:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(index_cache.lock, "acquire", refused)
    assert (rows(build(blended, tmp_path / "cache"), 50) == want).all()


def _build(arguments: tuple[list[tuple[float, str]], Path]) -> bytes:
    return pickle.dumps(rows(build(*arguments), 50).tolist())


def test_jobs_that_build_at_once_build_the_same(
    blended: list[tuple[float, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)  # forks have no process group
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.map_async(_build, [(blended, tmp_path / "cache")] * 8, 1).get(timeout=120)
    assert len({*found}) == 1
    assert not list((tmp_path / "cache").rglob(".*"))


def test_who_waits_too_long_is_told_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_cache, "PATIENCE_SECONDS", 0.0)
    with (
        index_cache.building(tmp_path),
        pytest.raises(UserError, match="held by building indices of data"),
        index_cache.building(tmp_path),
    ):
        pass
