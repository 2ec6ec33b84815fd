"""A model directory with any value in its descriptions is opened, or refused in one line that names a file of it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_files import write_hf
from hf_models import manifest, parent, random_state

from elastic_megatron.checkpoint import integrity
from elastic_megatron.checkpoint.amax import FILE as AMAX
from elastic_megatron.checkpoint.amax import read_amax
from elastic_megatron.checkpoint.hf_read import read_hf
from elastic_megatron.checkpoint.manifest import Manifest
from elastic_megatron.checkpoint.resolve import hf_manifest
from elastic_megatron.errors import UserError

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**39, 1.5, 0.0, float("nan"), float("inf"), "", "x", "../x", "a\0b", "1",
    "x" * 9000, [], [1], ["a"], [[[]]], [None], [1.5, "a"], {}, {"a": 1}, {"a": {"b": None}}, "M" * 5000, [0] * 5000,
)  # fmt: skip
FILES = ("config.json", "elastic_config.json", "model.safetensors.index.json")


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = (
        value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    )
    return [at, *(place for key, each in inner for place in _places(each, (*at, key)))]


def _changed(draw: random.Random, text: str) -> str:
    """A JSON text with one value replaced, removed, renamed or said twice."""
    data = json.loads(text)
    *way, last = draw.choice(_places(data)[1:])
    owner = data
    for key in way:
        owner = owner[key]
    match draw.randrange(8):
        case 0:
            del owner[last]
        case 1 if isinstance(owner, dict):
            owner[draw.choice(("", "../x", "a/b", "\0", "x" * 3000, ".x"))] = owner.pop(last)
        case 2 if isinstance(owner, dict):
            return text.replace(f'"{last}":', f'"{last}": {json.dumps(draw.choice(ODD))}, "{last}":', 1)
        case _:
            owner[last] = draw.choice(ODD)
    return json.dumps(data)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "m"
    write_hf(folder, manifest(), random_state(parent()).items(), elastic=True, max_shard_bytes=20_000)
    return folder


def _refused(read: Callable[[], object], folder: Path) -> bool:
    try:
        read()
    except UserError as e:
        assert str(folder) in str(e) and "\n" not in str(e) and len(str(e)) < 2000
        return True
    return False


def test_a_value_of_another_kind_is_one_line(directory: Path) -> None:
    """300 changes of the three descriptions; those that change nothing that is read pass."""
    draw, refused = random.Random(3), 0
    for _ in range(300):
        file = directory / draw.choice(FILES)
        whole = file.read_text()
        file.write_text(_changed(draw, whole))
        refused += _refused(lambda: read_hf(directory), directory)
        _refused(lambda: hf_manifest(directory), directory)
        file.write_text(whole)
    assert 100 < refused < 300
    assert not _refused(lambda: read_hf(directory), directory)


def test_flipped_and_missing_bytes_are_one_line(directory: Path) -> None:
    draw = random.Random(4)
    for _ in range(200):
        file = directory / draw.choice(FILES)
        whole = file.read_bytes()
        at = draw.randrange(len(whole))
        odd = draw.choice(
            (b"\0", b"\xff", b"\xef\xbb\xbf", b"\\ud800", b"1" * 5000, b"[" * 9000, b"{", b'"', b"\r\n")
        )
        file.write_bytes(draw.choice((whole[:at], whole[:at] + odd + whole[at + 1 :], odd + whole)))
        _refused(lambda: read_hf(directory), directory)
        file.write_bytes(whole)
    assert not _refused(lambda: read_hf(directory), directory)


def _inside(name: str) -> dict[str, Any]:
    return {"algorithm": "sha256", "files": {name: "0" * 64}, "sizes": {name: 1}}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (_inside("../secret"), "is no file of its folder"),
        (_inside("/etc/passwd"), "is no file of its folder"),
        (_inside("link"), "leads out of"),
        (_inside("fifo"), "is no ordinary file"),
        (_inside("none"), "is missing"),
        ({"algorithm": "sha256", "files": {"a": 3}}, "the digest of 'a' is 3"),
        ({"algorithm": "sha256", "files": {"a": "0" * 64}, "sizes": {"a": "1"}}, "the size of 'a' is '1'"),
        ({"algorithm": "sha256", "files": []}, "files is a list"),
        ({"algorithm": ["md5"], "files": {}}, "its algorithm is"),
    ],
)
def test_digests_are_of_files_of_the_folder(tmp_path: Path, data: dict[str, Any], said: str) -> None:
    folder = tmp_path / "iter"
    folder.mkdir()
    (tmp_path / "secret").write_text("x")
    (folder / "link").symlink_to("../secret")
    os.mkfifo(folder / "fifo")
    (folder / integrity.FILE).write_text(json.dumps(data))
    for check in (integrity.verify, integrity.verify_sizes):
        with pytest.raises(UserError, match=said):
            check(folder)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "/x", "a\n"])
def test_names_of_submodels_are_no_paths(tmp_path: Path, name: str) -> None:
    data = manifest().to_dict()
    data["submodels"][name] = data["submodels"].pop("small")
    (tmp_path / "elastic.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="is no name of a submodel"):
        Manifest.read(tmp_path / "elastic.json")


def test_magnitudes_are_pairs_of_finite_numbers(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for bad, said in (
        (torch.tensor([1.0, float("nan")]), "are no magnitudes"),
        (torch.tensor([-1.0, 1.0]), "are no magnitudes"),
        (torch.ones(3), "is no pair"),
        (torch.ones(2, dtype=torch.float64), "is no pair"),
    ):
        save_file({"a": bad}, tmp_path / AMAX)
        with pytest.raises(UserError, match=said):
            read_amax(tmp_path)
    (tmp_path / AMAX).unlink()
    os.mkfifo(tmp_path / AMAX)
    with pytest.raises(UserError, match="is a FIFO"):
        read_amax(tmp_path)
