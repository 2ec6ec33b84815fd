"""A folder to write recipes in, and the lines of the error that loading one raises."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_megatron.errors import UserError
from elastic_megatron.recipe import load

MINIMAL = """\
name: test
run_dir: run
model: {hf: parent}
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """Writes `text` to a file in the (empty) working directory and returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    return write


@pytest.fixture
def complaints(write: Callable[[str, str], str]) -> Callable[..., list[str]]:
    """Lines of the UserError for a recipe that is `MINIMAL` followed by `text` from line 4 on."""

    def complaints(text: str, *overrides: str) -> list[str]:
        write("r.yaml", MINIMAL + textwrap.dedent(text))
        with pytest.raises(UserError) as caught:
            load("r.yaml", overrides)
        return str(caught.value).splitlines()

    return complaints
