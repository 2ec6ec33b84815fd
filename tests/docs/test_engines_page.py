"""The page on engines says what their tests found, and its fields are in every config that is written."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from hf_files import write_hf
from hf_models import parent, random_state

from elastic_megatron.checkpoint.manifest import Manifest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
sys.path.append(str(ROOT / "tests" / "engines"))


def test_the_table_is_of_the_results_and_these_are_of_every_family() -> None:
    from families import SHAPES

    tool = runpy.run_path(str(ROOT / "tools" / "engines_table.py"))
    results = json.loads((ROOT / "docs" / "engine_results.json").read_text())
    begin, end = "<!-- engines-table:begin -->", "<!-- engines-table:end -->"
    assert PAGE.split(f"{begin}\n")[1].split(f"\n{end}")[0] == tool["render"](results)
    kinds = ("elastic directory", "slice")
    assert [(r["family"], r["kind"]) for r in results] == [(name, kind) for name in SHAPES for kind in kinds]
    numbers = [r["difference"] for r in results if not isinstance(r["difference"], str)]
    assert len(numbers) == len(results) - 2 and all(0 <= number < 1e-4 for number in numbers)


@pytest.mark.parametrize("pattern", ["MEM*E-M", "ME*", "M*-", "M*", "*E"])
def test_every_field_is_written_and_true(tmp_path: Path, pattern: str) -> None:
    """Whatever layers there are; those of layers that a model lacks are left out."""
    fields = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", PAGE, re.M))))
    own = {
        "n_groups": "M", "mamba_n_groups": "M", "time_step_limit": "-", "time_step_min": "M", "n_shared_experts": "E",
        "moe_shared_expert_intermediate_size": "E", "layers_block_type": "-", "block_configs": "-",
    }  # fmt: skip
    shape = parent(hybrid_layer_pattern=pattern, mamba_num_groups=2)
    write_hf(tmp_path / "m", Manifest(shape=shape), random_state(shape).items())
    config = json.loads((tmp_path / "m/config.json").read_text())
    for field in fields - {"time_step_limit", "layers_block_type", "block_configs"}:
        assert (field in config) >= (own.get(field, pattern[0]) in pattern), field
    truth = {
        "intermediate_size": 12, "n_groups": 2, "mamba_n_groups": 2, "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 6, "hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern),
    }  # fmt: skip
    assert {f: config[f] for f in truth if f in config} == {f: v for f, v in truth.items() if f in config}
