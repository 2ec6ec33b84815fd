"""Files of others are opened within bounds; ours appear whole or not at all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_megatron.errors import UserError
from elastic_megatron.files import json_files, reading, writing


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """None of them hangs: a FIFO without a writer would."""
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "fifo", tmp_path / "socket", Path("/dev/zero"), Path("/dev/tty")):
        with pytest.raises((UserError, OSError)):
            reading.read_bytes(path)
    for path in (tmp_path / "fifo", tmp_path / "socket", Path("/dev/zero")):
        with pytest.raises(UserError, match="give an ordinary file"):
            reading.read_bytes(path)
    with pytest.raises(IsADirectoryError):
        reading.read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        reading.read_bytes(tmp_path / "none")


def test_size_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 100)
    assert reading.read_bytes(tmp_path / "f", 100) == b"x" * 100
    with pytest.raises(UserError, match="larger than"):
        reading.read_bytes(tmp_path / "f", 99)


def test_names_stay_inside_their_folder(tmp_path: Path) -> None:
    home, said = tmp_path / "model", tmp_path / "model/index.json"
    (home / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (home / "link").symlink_to("../secret")
    (home / "up").symlink_to("..")
    (home / "fine").symlink_to("sub/file")
    for name in ("a", "sub/file", "fine", "missing"):
        assert reading.inside(home, name, said) == home / name
    for name in (
        "link",
        "up/secret",
        "../secret",
        "/etc/passwd",
        "",
        "a\0b",
        "sub/../../secret",
        None,
        3,
        "x" * 5000,
    ):
        with pytest.raises(UserError, match="leads out of|no file of its folder"):
            reading.inside(home, name, said)


def test_snapshots_of_the_hubs_cache_may_lead_to_its_blobs(tmp_path: Path) -> None:
    model = tmp_path / "hub/models--a--b"
    snapshot = model / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (snapshot / "w.safetensors").symlink_to("../../blobs/123")
    (snapshot / "out").symlink_to("../../../elsewhere")
    reading.inside(snapshot, "w.safetensors", snapshot / "index.json")
    (tmp_path / "short").symlink_to(snapshot)
    reading.inside(tmp_path / "short", "w.safetensors", snapshot / "index.json")
    with pytest.raises(UserError, match="leads out of"):
        reading.inside(snapshot, "out", snapshot / "index.json")


BAD_JSON = {
    "": "no valid JSON",
    "{": "no valid JSON",
    "[1]": "holds a list",
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}": "nested too deeply",
    '{"a": ' + "[" * 70 + "]" * 70 + "}": "nested too deeply",
    '{"a": ' + "1" * 5000 + "}": "no valid JSON",
    '"' + "x" * 2000 + '"': "larger than",
}


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: text[:8])
def test_json_is_bounded(tmp_path: Path, text: str) -> None:
    file = tmp_path / "f.json"
    file.write_text(text)
    with pytest.raises(UserError, match=BAD_JSON[text]):
        json_files.read_object(file, "m", limit=1500 if text.startswith('"') else 1 << 20)


def test_json_is_read_liberally_and_written_strictly(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text('{"a": Infinity}')
    data = json_files.read_object(file, "m")
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_files.write_object(file, data)
    assert json_files.read_object(file, "m") == data


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "f"
    writing.write_text(file, "old")
    with pytest.raises(ZeroDivisionError), writing.replacing(file) as f:
        f.write(b"half")
        raise ZeroDivisionError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


HALF = """
import sys
from pathlib import Path
from elastic_megatron.files import writing
writing.private_name(Path(sys.argv[1])).write_text("half")
"""


def test_abandoned_files_are_those_of_killed_writers_alone(tmp_path: Path) -> None:
    """Of a writer elsewhere nothing is known; what it left is abandoned when it is a day old."""
    subprocess.run([sys.executable, "-c", HALF, tmp_path / "f"], check=True, timeout=60)
    elsewhere = [tmp_path / f".f.{'0' * 8}-1-{token}.partial" for token in ("00000000", "11111111")]
    kept = [
        writing.private_name(tmp_path / "f"),
        elsewhere[1],
        *map(tmp_path.joinpath, ("f", ".f", "f.part")),
    ]
    for path in (*elsewhere, *kept):
        path.write_text("whole")
    os.utime(elsewhere[0], (1, 1))
    writing.remove_abandoned(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_a_write_removes_what_killed_writers_of_the_same_file_left(tmp_path: Path) -> None:
    """And of no other file: that one's writers clear it themselves."""
    for name in ("f", "g"):
        subprocess.run([sys.executable, "-c", HALF, tmp_path / name], check=True, timeout=60)
    writing.write_text(tmp_path / "f", "whole")
    assert (tmp_path / "f").read_text() == "whole"
    assert [p.name.split(".")[1] for p in tmp_path.glob(".*")] == ["g"]


def test_a_private_folder_replaces_those_for_the_same_target(tmp_path: Path) -> None:
    for name in ("out", "out.x", "[o]ut"):
        writing.private_name(tmp_path / name).mkdir()
    with writing.private_folder(tmp_path / "out") as folder:
        (folder / "f").write_text("whole")
        folder.rename(tmp_path / "out")
    assert (tmp_path / "out/f").read_text() == "whole"
    with pytest.raises(ZeroDivisionError), writing.private_folder(tmp_path / "[o]ut"):
        raise ZeroDivisionError
    (left,) = tmp_path.glob(".*")
    assert left.name.startswith(".out.x.")


def test_json_says_one_thing_under_a_key_in_characters_and_numbers_that_can_be_used() -> None:
    assert json_files.parse('{"a": 1, "a": 1}') == {"a": 1}
    assert json_files.parse(r'"\ud83d\ude00"') == "\U0001f600"
    for text, said in (
        ('{"a": 1, "a": 2}', "given twice"),
        (r'{"a": "\ud800"}', "surrogates"),
        ('{"a": ' + "1" * 41 + "}", "41 digits"),
    ):
        with pytest.raises(ValueError, match=said):
            json_files.parse(text)
