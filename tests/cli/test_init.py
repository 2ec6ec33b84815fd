"""A wheel brings what a clone has: recipes and texts, which ``init`` writes where they are wanted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cli_story import done, refused, snapshot

from elastic_megatron.files.shipped import MODELS

ROOT = Path(__file__).parents[2]
PARTS = ("elastic_megatron", "recipes", "examples", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def test_init_writes_the_recipes_of_the_repository_and_nothing_twice(tmp_path: Path) -> None:
    """Each model's recipes read as they are; models share a folder; what is there is never changed."""
    for model, folder in MODELS.items():
        done("init", tmp_path / "all", "--model", model)
        for file in (ROOT / "recipes" / folder).glob("*.yaml"):
            assert (tmp_path / "all" / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
        done("recipe", "show", tmp_path / "all" / "recipes" / folder / "chain.yaml", "--json")
    assert (tmp_path / "all/examples/data/shakespeare_train.txt").is_file()
    assert done("init", tmp_path / "all", "--json").json["written"] == []
    changed = tmp_path / "all" / "recipes/tiny_cpu/base.yaml"
    changed.write_text(changed.read_text() + "# mine\n")
    (tmp_path / "all/recipes/tiny_cpu/rank.yaml").unlink()
    before = snapshot(tmp_path)
    (line,) = refused("init", tmp_path / "all")
    assert line == f"{changed} is there already, and is not what would be written; name another folder"
    assert snapshot(tmp_path) == before


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel unpacks it, without the repository."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        path = ROOT / part
        if path.is_dir():
            shutil.copytree(path, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(path, source / part)
    build = f"import setuptools.build_meta as backend; print(backend.build_wheel({str(out)!r}))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120)
    (built,) = out.glob("*.whl")
    zipfile.ZipFile(built).extractall(out / "unpacked")
    shutil.rmtree(source)
    return out / "unpacked"


def test_a_wheel_has_all_that_init_and_the_quickstart_need(wheel: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from elastic_megatron.cli import main; import elastic_megatron\n"
        f"assert Path(elastic_megatron.__file__).is_relative_to({str(wheel)!r})\n"
        "assert main(['init', 'mine']) == 0\n"
        "assert main(['plan', 'mine/recipes/tiny_cpu/chain.yaml']) == 0\n"
        "assert main(['recipe', 'show', 'mine/recipes/tiny_cpu/chain.yaml']) == 0\n"
        "from elastic_megatron.quickstart.story import _story\n"
        "story = _story(Path('out').resolve(), None, None, None)\n"
        f"assert story.text.is_relative_to({str(wheel)!r}) and story.heldout.is_file()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(wheel), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert (wheel / "elastic_megatron/py.typed").is_file()
