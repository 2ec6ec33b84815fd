"""``plan`` of a quantised directory: the bytes of its own files, from the table and the list of what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_files import slice_hf, write_hf
from hf_models import random_state, stored
from plan_calls import NANO as RECIPE
from plan_calls import parse, planned
from quantised_dirs import SHAPE, family, left_alone, pack

from elastic_megatron.cli import main
from elastic_megatron.cost.sizes import parent_fields
from elastic_megatron.quantization.formats import FORMATS, NVFP4, Format
from elastic_megatron.recipe import load
from elastic_megatron.space import ParentShape, ends, tensors_of


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


RECIPES = Path(__file__).parents[2] / "recipes"
NANO = (str(RECIPES / "nemotron3_nano_30b/plan.yaml"), "quantize={format: nvfp4}")
GIB = 2**30


def test_the_nano_30b_is_as_large_as_it_was_published() -> None:
    """arXiv 2605.07182: 18.7 GB of NVFP4 and 58.9 GB of BF16, of which GB are GiB; its list of what stays BF16 is not
    known, ours is that of the official FP8 and NVFP4 checkpoints of the parent, whose layout comes to 18.0."""
    result = planned(*NANO)
    assert result["stored_format"] == "nvfp4"
    assert result["left_alone"] == {"attention": [5, 12, 19, 26, 33, 42], "mamba": [4, 11, 18, 25, 32, 41]}
    assert result["parent"]["stored_bytes"] / GIB == pytest.approx(18.01, abs=0.005)
    assert result["family_bytes"]["stored"] == result["submodels"]["full"]["stored_bytes"]
    assert result["parent"]["weights_bytes"]["bf16"] / GIB == pytest.approx(58.9, rel=0.002)
    every_mamba = planned(*NANO, "quantize.preset=mamba_moe_conservative")
    assert every_mamba["left_alone"]["mamba"] == [
        i for i in range(52) if i in every_mamba["left_alone"]["mamba"]
    ]
    assert len(every_mamba["left_alone"]["mamba"]) == 23
    shared = planned(*NANO, "quantize.keep=['*.shared_experts.*']")
    sizes = [each["parent"]["stored_bytes"] / GIB for each in (shared, every_mamba)]
    assert sizes == pytest.approx([18.61, 18.88], abs=0.02) and sizes[0] < 18.7 < sizes[1]


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_stored_bytes_are_counted_from_the_table(form: Format) -> None:
    """A second count, weight by weight, of what the preset quantises."""
    result = planned(NANO[0], f"quantize={{format: {form.name}}}")
    kept = {5, 12, 19, 26, 33, 42, 4, 11, 18, 25, 32, 41}
    shape = ParentShape.from_dict(load(NANO[0]).model.sizes.model_dump())  # type: ignore[union-attr]
    sizes, total = parent_fields(shape), 0
    for layer, symbol in enumerate(shape.hybrid_layer_pattern):
        for tensor in tensors_of(symbol, sizes):
            number, size = shape.num_moe_experts if tensor.per_expert else 1, tensor.numel(sizes)
            if tensor.role == "matmul" and not tensor.fp32 and layer not in kept:
                each = size + 8 if form.name == "fp8" else size // 2 + size // 16 + 8
            else:
                each = size * (4 if tensor.fp32 or tensor.name == "mixer.dt_bias" else 2)
            total += number * each
    total += 2 * sum(end.numel(sizes) for end in ends(False))
    assert result["parent"]["stored_bytes"] == total
    assert result["family_bytes"]["separate"]["stored"] == sum(
        size["stored_bytes"] for size in result["submodels"].values()
    )


def test_a_plan_says_what_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *NANO]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "BF16: attention 5, 12, 19, 26, 33, 42; Mamba 4, 11, 18, 25, 32, 41; embeddings; lm_head; norms; convolutions; "
        "FP32: moe_router" in text
    )
    assert "quantised to NVFP4: 18.0 GiB; as separate files, full and smallest would take 23.4 GiB" in text
    assert main(["plan", NANO[0]]) == 0
    assert "quantised to" not in capsys.readouterr().out


def test_a_chain_is_planned_as_its_last_job_leaves_it() -> None:
    result = planned(str(RECIPES / "nemotron3_nano_30b/plan.yaml"))
    assert (
        "stored_format" not in result
        and "left_alone" not in result
        and "stored" not in result["family_bytes"]
    )
    assert result["parent"]["weights_bytes"] == planned(*NANO)["parent"]["weights_bytes"]


def test_a_plan_with_modules_that_are_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *NANO, "quantize.keep=[lm_heads]"]) == 2
    assert "error: quantize.keep: 'lm_heads' is no linear" in capsys.readouterr().err


def test_expert_widths_that_engines_refuse_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the ranks that are asked for; without, of one rank and of what is quantised to NVFP4."""
    told = {n: planned(RECIPE, "--serving-tensor", n)["serving"] for n in (4, 8)}
    assert told[4] == [] and [line.split()[0] for line in told[8]][:1] == ["moe_ffn_hidden_size=1856"]
    odd = ["space.choices.moe_ffn_hidden_size=[1000,1856]", "space.granule.moe_ffn_hidden_size=8"]
    form = "quantize={format: nvfp4}"
    assert planned(RECIPE, *odd)["serving"] == [] != planned(RECIPE, *odd, form)["serving"]
    args = parse(RECIPE, "--serving-tensor", 8)
    args.handler(args)
    assert "1792 or 1920 can" in capsys.readouterr().out
