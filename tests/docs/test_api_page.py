"""The public names are what the package says, come when they are used, and have a page each."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import elastic_megatron

ROOT = Path(__file__).parents[2]
LAZY = elastic_megatron._FOLDERS


def test_public_names_are_those_of_their_folders_for_people_and_for_type_checkers() -> None:
    """``__all__``, the table of folders and the imports for type checkers are three forms of one list."""
    tree = ast.parse((ROOT / "elastic_megatron" / "__init__.py").read_text())
    typed = {
        n.module: {a.name for a in n.names}
        for n in ast.walk(tree)
        if isinstance(n, ast.ImportFrom) and n.level
    }
    assert typed == LAZY
    assert sorted(elastic_megatron.__all__) == sorted(name for names in LAZY.values() for name in names)
    for folder, names in LAZY.items():
        for name in names:
            found = getattr(elastic_megatron, name)
            assert found is getattr(import_module(f"elastic_megatron.{folder}"), name)
            assert inspect.getdoc(found), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        elastic_megatron.nothing  # noqa: B018
    assert (ROOT / "elastic_megatron" / "py.typed").exists()


def test_what_needs_no_torch_comes_without_it() -> None:
    code = "import sys; from elastic_megatron import Budget, ElasticSpace, Recipe, account, load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_every_public_name_has_its_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["api_page.py", str(tmp_path)])
    assert runpy.run_path(str(ROOT / "tools" / "api_page.py"))["main"]() == 0
    page = (tmp_path / "elastic_megatron.html").read_text()
    assert set(elastic_megatron.__all__) <= set(re.findall(r'<section id="(\w+)"', page))
    assert not (tmp_path / "elastic_megatron").exists()
