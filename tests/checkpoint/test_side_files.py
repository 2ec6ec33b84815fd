"""What goes along with weights: files of the directory itself, and only the code that its config names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_megatron.checkpoint.side_files import code_modules, copy_side_files, left_behind, side_files
from elastic_megatron.errors import UserError

PLAIN = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "LICENSE",
    "generation_config.json",
)
NESTED = "additional_chat_templates/tools.jinja"
CONFIG = {"auto_map": {"AutoConfig": "configuration_x.X", "AutoModel": "owner/name--modeling_x.X",
                       "AutoTokenizer": ["tokenizer_x.T", None]}}  # fmt: skip


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    home = tmp_path / "model"
    (home / "additional_chat_templates").mkdir(parents=True)
    (home / "tokenizer_cache").mkdir()
    code = ("configuration_x.py", "modeling_x.py", "tokenizer_x.py", "tokenizer_evil.py", "setup.py")
    for name in (
        *PLAIN,
        NESTED,
        *code,
        "config.json",
        "model.safetensors",
        "README.md",
        ".gitattributes",
        "weights.bin",
    ):
        (home / name).write_text(name)
    return home


def test_code_comes_along_only_where_auto_map_names_it_in_this_directory(
    directory: Path, tmp_path: Path
) -> None:
    names = {*PLAIN, NESTED, "configuration_x.py", "tokenizer_x.py"}
    assert set(copy_side_files(directory, CONFIG, tmp_path / "out")) == names
    copied = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert copied == names
    assert left_behind(directory, CONFIG) == (
        "modeling_x.py", "setup.py", "tokenizer_cache", "tokenizer_evil.py", "weights.bin",
    )  # fmt: skip


@pytest.mark.parametrize(
    "named", ["x.X", {"A": "../../x.X"}, {"A": "a.b.X"}, {"A": "x"}, {"A": 3}, {"A": [["x.X"]]}, [], None, {"A": "-x.X"}]
)  # fmt: skip
def test_whatever_else_auto_map_holds_names_no_code(named: Any) -> None:
    assert code_modules({"auto_map": named}) == ()


def _link(target: str) -> Callable[[Path], object]:
    def change(d: Path) -> None:
        (d / "tokenizer.json").unlink()
        (d / "tokenizer.json").symlink_to(target)

    return change


def _fifo(d: Path) -> None:
    os.mkfifo(d / "merges.txt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_link("/etc/passwd"), r"tokenizer\.json leads out of"),
        (_link("../../x"), r"tokenizer\.json leads out of"),
        (_link("none"), r"tokenizer\.json cannot be read \(No such file"),
        (_fifo, r"merges\.txt is a FIFO"),
    ],
)
def test_links_out_and_what_is_no_file_are_refused_by_name(
    directory: Path, change: Callable[[Path], object], said: str
) -> None:
    assert side_files(directory, {})
    change(directory)
    with pytest.raises(UserError, match=said):
        side_files(directory, {})


def test_links_within_the_directory_are_files(directory: Path) -> None:
    before = side_files(directory, CONFIG)
    _link("LICENSE")(directory)
    assert side_files(directory, CONFIG) == before
