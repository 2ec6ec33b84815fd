"""``plan`` of a quantised directory: the bytes of its own files, from the table and the list of what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_files import slice_hf, write_hf
from hf_models import random_state, stored
from plan_calls import planned
from quantised_dirs import SHAPE, family, left_alone, pack

from elastic_megatron.quantization.formats import FORMATS, NVFP4, Format


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("exclude", ["official", "only the ends"])
@pytest.mark.parametrize("tied", [False, True])
def test_planned_bytes_are_those_on_disk(tmp_path: Path, form: Format, exclude: str, tied: bool) -> None:
    shape = SHAPE.override(tie_embeddings=tied)
    modules = left_alone(shape) if exclude == "official" else ["backbone.embeddings", "lm_head"]
    names = ["whole", "smallest", "middle"]
    state = random_state(shape)
    write_hf(tmp_path / "bf16", family(shape), state.items(), elastic=True, dtype=torch.bfloat16)
    pack(tmp_path / "bf16", tmp_path / "q", form, modules)
    slice_hf(tmp_path / "q", tmp_path / "s", names)
    result = planned(tmp_path / "q")
    assert result["stored_format"] == form.name
    for name in names:
        on_disk = sum(t.nbytes for t in stored(tmp_path / "s" / name).values())
        assert result["submodels"][name]["stored_bytes"] == on_disk
        assert planned(tmp_path / "s" / name)["parent"]["stored_bytes"] == on_disk
    assert "stored_bytes" not in planned(tmp_path / "bf16")["parent"]


def test_a_quantised_directory_is_planned_without_torch(tmp_path: Path) -> None:
    write_hf(tmp_path / "bf16", family(), random_state(SHAPE).items(), elastic=True, dtype=torch.bfloat16)
    pack(tmp_path / "bf16", tmp_path / "q", NVFP4)
    code = (
        "import sys; from elastic_megatron.cli import main; "
        f"status = main(['plan', {str(tmp_path / 'q')!r}]); sys.exit(status or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "stored: NVFP4" in " ".join(done.stdout.split())


def test_sizes_are_planned_where_the_format_cannot_be_read(tmp_path: Path) -> None:
    """As of published checkpoints whose cache is quantised, or of a ``config.json`` alone."""
    write_hf(tmp_path / "bf16", family(), random_state(SHAPE).items(), elastic=True, dtype=torch.bfloat16)
    pack(tmp_path / "bf16", tmp_path / "q", NVFP4)
    (tmp_path / "q/hf_quant_config.json").unlink()
    result = planned(tmp_path / "q")
    assert "hf_quant_config.json is missing" in result["unread"] and "stored_format" not in result
    assert result["parent"] == planned(tmp_path / "bf16")["parent"]
