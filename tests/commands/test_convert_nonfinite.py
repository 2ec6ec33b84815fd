"""``import``, ``export`` and ``slice`` refuse what is not finite by name, unless told otherwise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hf_files import write_hf
from hf_models import manifest, parent, random_state

from elastic_megatron.cli import main

NAME = "backbone.layers.1.mixer.gate.weight"


@pytest.fixture
def elastic(tmp_path: Path) -> Path:
    state = random_state(parent())
    state["decoder.layers.1.mlp.router.weight"][0, 0] = math.nan
    write_hf(tmp_path / "elastic", manifest(), state.items(), elastic=True, allow_nonfinite=True)
    return tmp_path / "elastic"


def test_each_command_refuses_and_can_be_told_otherwise(
    elastic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for source, command, more in (
        (elastic, "import", ()),
        (elastic, "slice", ("--submodel", "small")),
        (tmp_path / "import", "export", ()),
        (tmp_path / "import", "export", ("--submodel", "middle", "--dtype", "bf16")),
    ):
        target = tmp_path / (command if command == "import" else f"{command} {len(more)}")
        call = [command, str(source), str(target), *more]
        assert main(call) == 2
        [line] = [said for said in capsys.readouterr().err.splitlines() if said.startswith("error: ")]
        assert line.startswith(f"error: {target}: 1 tensor with numbers that are not finite") and NAME in line
        assert not target.exists()
        assert main([*call, "--allow-nonfinite", "--verify"]) == 0
        told = capsys.readouterr()
        assert f"warning: {target}: 1 tensor" in told.err and "wrote" in told.out
