"""A model that is not finite, or overflows on the calibration data, is neither ranked nor quantised: one line says where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_runs import recipe_of, save_family

from elastic_megatron.checkpoint import tracker
from elastic_megatron.errors import BAD_INPUT, UserError
from elastic_megatron.recipe import Recipe
from elastic_megatron.training import quantize as quantizing
from elastic_megatron.training import rank as ranking
from elastic_megatron.training.quantize import quantize
from elastic_megatron.training.rank import rank

pytestmark = pytest.mark.usefixtures("megatron")
VALUES = {"overflows": 3e38, "infinite": float("inf")}


def spoil(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: float) -> None:
    """The parent that a command fills its model from has one weight like this."""
    original = module.parent_source

    def opened(recipe: Recipe) -> Any:
        source = original(recipe)

        def fill(chunks: Any) -> None:
            source.fill(chunks)
            with torch.no_grad():
                chunks[0].get_parameter(name).fill_(value)

        return replace(source, fill=fill)

    monkeypatch.setattr(module, "parent_source", opened)


def refused(command: Callable[[Recipe], object], recipe: Recipe) -> str:
    with pytest.raises(UserError) as caught:
        command(recipe)
    assert caught.value.status == BAD_INPUT and "\n" not in str(caught.value)
    assert tracker.newest(recipe.run_dir / "checkpoints") is None
    return str(caught.value)


@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("how", VALUES)
def test_ranking(
    elastic: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, depth: bool
) -> None:
    choices = {"hidden_size": [16, 20], "num_moe_experts": [4]} | ({"num_layers": [3]} if depth else {})
    settings = {"samples": 4, "seq_length": 16, "micro_batch_size": 4, "depth": depth}
    recipe = elastic(tmp_path / "run", space={"choices": choices}, rank=settings)
    spoil(monkeypatch, ranking, "decoder.layers.0.mixer.out_proj.weight", VALUES[how])
    said = refused(rank, recipe)
    if how == "infinite":
        assert "decoder.layers.0.mixer.out_proj.weight has NaN or infinite values" in said
    else:
        assert "are not finite: the model overflows" in said
    assert not (recipe.run_dir / "ranking.safetensors").exists()


@pytest.mark.parametrize("form", ["fp8", "nvfp4"])
@pytest.mark.parametrize("how", VALUES)
def test_quantising(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    form: str,
) -> None:
    family = save_family(tmp_path / "family")
    recipe = recipe_of(write_recipe, tmp_path / "run", family, quantize={"format": form})
    spoil(monkeypatch, quantizing, "decoder.layers.0.mixer.out_proj.weight", VALUES[how])
    said = refused(quantize, recipe)
    if how == "infinite":
        assert "decoder.layers.0.mixer.out_proj.weight has NaN or infinite values" in said
    else:
        assert "inputs of " in said and "decoder.layers." in said
